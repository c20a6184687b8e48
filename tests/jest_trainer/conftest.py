from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import jest_trainer as jest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the tests' own modules: scripted_server and loops

from scripted_server import ScriptedServer  # noqa: E402 - found through the line above

DEADLINE_S = 5.0
POLICY = jest.SelectionPolicy(filter_ratio=0.75, num_chunks=2)


def until(condition, timeout_s=10.0):
    """Polls until a condition holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come to hold"
        time.sleep(0.005)


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


def super_batch(step, rows=8):
    """Row r of step s has key s-r, pixels of value 10 * s + r, and the embedding e(r), largest for odd rows."""
    row = torch.arange(rows)
    return {
        "keys": [f"{step}-{r}" for r in range(rows)],
        "row": row,
        "image": (10 * step + row)[:, None, None, None].expand(rows, 3, 2, 2).to(torch.uint8),
        "tokens": row[:, None].expand(rows, 4).int(),
        "step": step,
    }


def embeddings(batch, dtype=torch.float32):
    row = batch["row"]
    first = (row % 2) + row / 100
    image = torch.stack([first, torch.zeros(len(row))], dim=1)
    return jest.Embeddings(image.to(dtype), image.to(dtype), scale=10.0, bias=-1.0)


EXPECTED_ROWS = [7, 5]
"""What the scripted server chooses of `super_batch` under POLICY: the quarter with the largest embeddings."""


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
