from __future__ import annotations

import os
import time

import jest_trainer as jest
import pytest
import torch
from conftest import POLICY, super_batch
from torch.utils.data import DataLoader, Dataset

BOUND_S = 1.0


def in_child(action):
    """Runs an action in a forked child; returns what it returned or raised, as text, and how long it took."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        started = time.monotonic()
        try:
            said = str(action())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, f"{time.monotonic() - started:.3f} {said}".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        seconds, _, said = pipe.read().partition(" ")
    os.waitpid(child, 0)
    return said, float(seconds)


def test_a_child_that_inherited_a_used_client_is_refused_at_once(client):
    client.server_info()
    said, seconds = in_child(client.server_info)
    assert "JestError: GetServerInfo was not made: this client belongs to process" in said
    assert "make a Client in the process that uses it" in said
    assert seconds < BOUND_S


def test_the_parent_goes_on_after_a_child_was_refused(client):
    client.server_info()
    in_child(client.server_info)
    assert client.server_info().version == "1.2.3"


def test_a_child_may_close_an_inherited_client(client):
    client.server_info()
    said, seconds = in_child(client.close)
    assert said == "None"
    assert seconds < BOUND_S
    assert client.server_info().version == "1.2.3"


def test_a_child_that_inherited_a_running_loop_is_refused_at_once(make_loop):
    loop = iter(make_loop([super_batch(step) for step in range(3)]))
    next(loop)
    said, seconds = in_child(lambda: next(loop))
    assert said.startswith("JestError: the next super-batch was not made")
    assert seconds < BOUND_S
    loop.close()


def test_a_client_that_was_not_used_before_the_fork_may_be_used_after_it(process_server):
    # In a process that has never used gRPC, as a fork after use of gRPC is not safe whatever the SDK does.
    import subprocess
    import sys

    program = (
        "import os, sys, jest_trainer as jest\n"
        f"client = jest.Client({process_server[1]!r}, deadline_s=5)\n"
        "if os.fork() == 0:\n"
        "    print(client.server_info().version, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], timeout=30, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1.2.3"


class Rows(Dataset):
    """Rows in a worker process; with a client, asks it for something in there."""

    def __init__(self, client=None):
        self.client = client

    def __len__(self):
        return 24

    def __getitem__(self, index):
        if self.client is not None:
            self.client.server_info()
        return {"keys": f"k{index}", "row": index % 8, "image": torch.zeros(3, 2, 2, dtype=torch.uint8)}


def test_workers_of_a_data_loader_load_while_the_client_is_in_use(client, make_loop):
    client.server_info()
    loader = DataLoader(Rows(), batch_size=8, num_workers=2)
    loop = make_loop(loader, features=lambda batch: {"image": batch["image"]})
    assert [batch["keys"] for batch in loop] == [["k7", "k5"], ["k15", "k13"], ["k23", "k21"]]


def test_a_data_loader_s_worker_that_uses_an_inherited_client_is_refused_at_once(client):
    client.create_job("run-1", reference_model="r", policy=POLICY)
    started = time.monotonic()
    with pytest.raises(jest.JestError, match="this client belongs to process"):
        next(iter(DataLoader(Rows(client), batch_size=8, num_workers=1)))
    assert time.monotonic() - started < 5 * BOUND_S  # starting and ending the worker included
