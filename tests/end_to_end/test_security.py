"""Every way into a selector that is open to other machines: a real process, TLS, tokens, Redis, and the SDK."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import torch
from typer.testing import CliRunner

import jest_trainer as jest
from jest_proto.v1 import jobs_pb2, jobs_pb2_grpc
from jest_server.cli import app as cli_app
from jest_server.local.jest_process import JestProcess
from jest_server.local.process import free_port
from jest_server.runtime.security.tokens import add_token
from support.certificates import make_authority, needs_openssl, sign
from support.polling import wait_until
from support.servers import queue_server_of

pytestmark = needs_openssl

Code = grpc.StatusCode
POLICY = jest.SelectionPolicy(scoring="uniform", filter_ratio=0.5)


class Selector:
    """A selector with TLS and two tenants."""

    def __init__(self, folder, queue_url):
        self.log = folder / "selector.log"
        self.authority = make_authority(folder)
        pair = sign(self.authority, folder, "server")
        self.tokens = folder / "tokens.json"
        self.vision = add_token(self.tokens, "vision-1", "vision", expires_at=None)
        self.speech = add_token(self.tokens, "speech-1", "speech", expires_at=None)
        self.expired = add_token(self.tokens, "old", "vision", expires_at=datetime.now(UTC) - timedelta(days=1))
        self.port = free_port()
        settings = {
            "listen": f"127.0.0.1:{self.port}",
            "queue_url": queue_url,
            "cache_url": queue_url,
            "tls_certificate": pair.certificate,
            "tls_key": pair.key,
            "tokens_file": self.tokens,
            "drain_delay_s": 0,
        }
        self.process = JestProcess("selector", "jest_server.selector", self.log, settings)
        # The embedded stack's readiness check speaks plain text.
        settings["health_listen"] = f"127.0.0.1:{self.process.port}"

    def client(self, token, **options):
        roots = grpc.ssl_channel_credentials(self.authority.certificate.read_bytes())
        return jest.Client(f"localhost:{self.port}", token=token, **{"credentials": roots, "deadline_s": 10} | options)


@pytest.fixture(scope="module")
def selector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("security")
    with queue_server_of("valkey", folder / "queue") as queue:
        selector = Selector(folder, f"{queue.url}/0")
        selector.process.start()
        yield selector
        selector.process.stop()


def refusal(client, call):
    with client, pytest.raises(jest.JestError) as caught:
        call(client)
    return caught.value


def make_job(client):
    return client.create_job("private", policy=POLICY)


def test_who_has_a_token_is_served(selector):
    with selector.client(selector.vision) as client:
        assert make_job(client).name == "private"
        assert client.get_job("private").name == "private"


@pytest.mark.parametrize(
    ("pick", "reason"),
    [
        (lambda _: None, "TOKEN_MISSING"),
        (lambda _: "jest_guessed", "TOKEN_INVALID"),
        (lambda selector: selector.vision[:-1], "TOKEN_INVALID"),
        (lambda selector: selector.expired, "TOKEN_EXPIRED"),
    ],
)
@pytest.mark.parametrize("call", [make_job, lambda client: client.get_job("private"), jest.Client.server_info])
def test_who_has_none_that_is_valid_is_refused_everywhere(selector, pick, reason, call):
    error = refusal(selector.client(pick(selector)), call)
    assert (error.code, error.reason) == (Code.UNAUTHENTICATED, reason)


def test_plain_text_gets_no_answer_from_a_port_with_tls(selector):
    error = refusal(selector.client(selector.vision, credentials=None, deadline_s=1), make_job)
    assert error.code is Code.UNAVAILABLE


def test_the_port_for_probes_serves_nothing_else(selector):
    channel = grpc.insecure_channel(f"127.0.0.1:{selector.process.port}")
    with channel, pytest.raises(grpc.RpcError) as caught:
        jobs_pb2_grpc.JobServiceStub(channel).ListJobs(jobs_pb2.ListJobsRequest(), timeout=5)
    assert caught.value.code() is Code.UNIMPLEMENTED


def test_the_conformance_suite_finds_its_way_through_tls_and_tokens(selector, tmp_path):
    (tmp_path / "token").write_text(f"{selector.vision}\n")
    options = [f"--server=localhost:{selector.port}", f"--ca={selector.authority.certificate}"]
    # As `helm test` runs it: apart from the configuration and the fixtures of all other tests.
    alone = ["--config-file=/dev/null", "--rootdir=.", "--confcutdir=tests/conformance", "--import-mode=importlib"]
    suite = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *alone, "tests/conformance", *options]
    some = ["-k", "health or reflection or tells_its_version"]
    run = {"cwd": Path(__file__).parents[2], "env": os.environ | {"PYTHONPATH": "tests"}}
    let_in = subprocess.run([*suite, f"--token-file={tmp_path / 'token'}", *some], check=False, **run)
    sent_off = subprocess.run([*suite, *some], check=False, **run)
    assert (let_in.returncode, sent_off.returncode) == (0, 1)


def test_a_tenant_neither_sees_nor_touches_anothers_jobs(selector):
    with selector.client(selector.vision) as vision, selector.client(selector.speech) as speech:
        vision.create_job("mine", policy=POLICY, seed=1)
        unknown = refusal(selector.client(selector.speech), lambda client: client.get_job("nothing"))
        hidden = refusal(selector.client(selector.speech), lambda client: client.get_job("mine"))
        assert (hidden.code, hidden.reason) == (unknown.code, unknown.reason) == (Code.NOT_FOUND, "JOB_UNKNOWN")
        assert str(hidden).replace("mine", "nothing") == str(unknown)
        assert "speech" not in str(hidden)
        speech.create_job("mine", policy=POLICY, seed=2)  # a name of its own: no conflict
        assert vision.create_job("mine", policy=POLICY, seed=1).name == "mine"
        with pytest.raises(jest.JestError, match="choose another name") as caught:
            vision.create_job("mine", policy=POLICY, seed=2)
        assert "~" not in str(caught.value)
        assert caught.value.metadata["job"] == "mine"


def test_the_same_ids_of_two_tenants_are_two_selections(selector):
    chosen = {}
    for token, seed in ((selector.vision, 1), (selector.speech, 2)):
        with selector.client(token) as client:
            job = client.create_job("training", policy=POLICY, seed=seed)
            batches = [{"keys": [f"example-{row}" for row in range(64)]} for _ in range(2)]
            loop = jest.SelectedBatches(job, batches, keys=lambda batch: batch["keys"], embed=embed)
            chosen[seed] = [tuple(batch["keys"]) for batch in loop]
            assert job.counters().selected == 2
    assert all(len(keys) == 32 for batches in chosen.values() for keys in batches)
    assert chosen[1] != chosen[2]


def test_lists_hold_a_tenants_own_jobs_alone_page_by_page(selector):
    for token in (selector.vision, selector.speech):
        with selector.client(token) as client:
            for number in range(3):
                client.create_job(f"page-{number}", policy=POLICY)
    credentials = grpc.ssl_channel_credentials(selector.authority.certificate.read_bytes())
    metadata = (("authorization", f"Bearer {selector.speech}"),)
    names, page = [], ""
    with grpc.secure_channel(f"localhost:{selector.port}", credentials) as channel:
        jobs = jobs_pb2_grpc.JobServiceStub(channel)
        for _ in range(10):
            request = jobs_pb2.ListJobsRequest(page_size=1, page_token=page)
            answer = jobs.ListJobs(request, metadata=metadata, timeout=5)
            names += [job.spec.name for job in answer.jobs]
            page = answer.next_page_token
            if not page:
                break
        assert [name for name in names if name.startswith("page-")] == ["page-0", "page-1", "page-2"]
        assert not any("~" in name for name in names)
        deleted = jobs.DeleteJob(jobs_pb2.DeleteJobRequest(name="page-0"), metadata=metadata, timeout=5)
        assert deleted.deleted
    with selector.client(selector.vision) as client:
        assert client.get_job("page-0").name == "page-0"


@pytest.mark.parametrize("name", ["vision~private", "../private", "vision/private", "~private"])
def test_no_name_leads_out_of_a_tenants_own(selector, name):
    credentials = grpc.ssl_channel_credentials(selector.authority.certificate.read_bytes())
    with grpc.secure_channel(f"localhost:{selector.port}", credentials) as channel:
        jobs = jobs_pb2_grpc.JobServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            jobs.GetJob(
                jobs_pb2.GetJobRequest(name=name), metadata=(("authorization", f"Bearer {selector.speech}"),), timeout=5
            )
    assert caught.value.code() is Code.INVALID_ARGUMENT


def test_tokens_are_made_and_taken_away_while_the_server_runs(selector):
    command = ["token", "vision", "--id", "night", "--file", str(selector.tokens), "--days", "30"]
    made = CliRunner().invoke(cli_app.app, command)
    assert made.exit_code == 0, made.output
    token = made.stdout.strip()
    with selector.client(token) as client:
        wait_until(lambda: served(client))
        kept = [entry for entry in json.loads(selector.tokens.read_text()) if entry["id"] != "night"]
        selector.tokens.write_text(json.dumps(kept))
        wait_until(lambda: not served(client))
    again = CliRunner().invoke(cli_app.app, ["token", "vision", "--id", "vision-1", "--file", str(selector.tokens)])
    assert again.exit_code == 2
    assert "is taken" in again.output


def test_no_secret_is_in_the_log(selector):
    with selector.client(selector.vision) as client:
        make_job(client)
    refusal(selector.client(selector.expired), make_job)
    log = selector.log.read_text()
    assert "TOKEN_EXPIRED" in log
    assert not any(secret in log for secret in (selector.vision, selector.speech, selector.expired))


def embed(batch):
    image, text = torch.nn.functional.normalize(torch.randn(2, len(batch["keys"]), 8), dim=-1)
    return jest.Embeddings(image, text, scale=10.0, bias=-5.0)


def served(client):
    try:
        client.server_info()
    except jest.JestError as error:
        if error.reason != "TOKEN_INVALID":
            raise
        return False
    return True
