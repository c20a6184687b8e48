from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import jest_trainer as jest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the tests' own modules: scripted_server and trainer_samples

from scripted_server import ScriptedServer  # noqa: E402 - found through the line above
from trainer_samples import POLICY, embeddings, until  # noqa: E402 - as above

DEADLINE_S = 20.0


@pytest.fixture(name="until")
def until_fixture():
    return until


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("jest-")])


@pytest.fixture
def server():
    server = ScriptedServer()
    yield server
    server.stop()


@pytest.fixture
def client(server):
    with jest.Client(server.address, deadline_s=DEADLINE_S) as client:
        yield client


@pytest.fixture
def job(client):
    return client.create_job("run-1", reference_model="reference", policy=POLICY)


@pytest.fixture
def process_server():
    """A scripted server in a process of its own, that may be stopped or killed: (process, address)."""
    with subprocess.Popen(
        [sys.executable, str(HERE / "scripted_server.py")], stdout=subprocess.PIPE, text=True
    ) as process:
        yield process, f"127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


@pytest.fixture
def make_loop(job):
    """Makes a SelectedBatches over `super_batch`es; keyword arguments override."""

    def make(super_batches, **changes):
        options = {
            "keys": lambda batch: batch["keys"],
            "features": lambda batch: {"image": batch["image"], "tokens": batch["tokens"]},
            "embed": embeddings,
        } | changes
        return jest.SelectedBatches(options.pop("job", job), super_batches, **options)

    return make
