"""What a person without our code sees: buf curl, by reflection alone."""

import json
import subprocess
import sys
from pathlib import Path

BUF = Path(sys.executable).with_name("buf")


def buf_curl(*arguments):
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def test_the_services_are_listed(stack):
    listed = buf_curl("--list-services", f"http://{stack.address}").split()
    assert {"jest.v1.SelectionService", "jest.v1.JobService", "grpc.health.v1.Health"} <= set(listed)


def test_health_is_read(stack):
    for service in ("", "jest.v1.SelectionService", "jest.v1.JobService"):
        answer = buf_curl("-d", json.dumps({"service": service}), f"http://{stack.address}/grpc.health.v1.Health/Check")
        assert json.loads(answer) == {"status": "SERVING"}


def test_the_scorer_answers_health_checks_too(stack):
    answer = buf_curl("-d", "{}", f"http://127.0.0.1:{stack.scorer.port}/grpc.health.v1.Health/Check")
    assert json.loads(answer) == {"status": "SERVING"}


def test_a_call_is_made_without_generated_code(stack):
    answer = buf_curl("-d", "{}", f"http://{stack.address}/jest.v1.SelectionService/GetServerInfo")
    assert json.loads(answer)["learnerDatatypes"] == ["FP32", "FP16", "BF16"]
