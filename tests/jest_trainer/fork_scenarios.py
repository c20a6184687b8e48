"""What happens around forks, told as JSON: scenario -> [what was said, seconds it took].

A program of its own, so that nothing of it lingers in the process that runs the tests. Argument: a server's address.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
from torch.utils.data import DataLoader, Dataset
from trainer_samples import POLICY, embeddings, super_batch

import jest_trainer as jest


def in_child(action):
    """Runs an action in a forked child; returns what it returned or raised, as text, and how long it took."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps(timed(action)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = json.loads(pipe.read())
    os.waitpid(child, 0)
    return told


def timed(action):
    started = time.monotonic()
    try:
        said = str(action())
    except Exception as error:  # noqa: BLE001 - told to the test
        said = f"{type(error).__name__}: {error}"
    return said, time.monotonic() - started


class Rows(Dataset):
    """Rows made in a worker process; with a client, asks it for something in there."""

    def __init__(self, client=None):
        self.client = client

    def __len__(self):
        return 24

    def __getitem__(self, index):
        if self.client is not None:
            self.client.server_info()
        return {"keys": f"k{index}", "row": index % 8, "image": torch.zeros(3, 2, 2, dtype=torch.uint8)}


def loop_over(job, super_batches, prefix):
    return jest.SelectedBatches(
        job,
        super_batches,
        keys=lambda batch: batch["keys"],
        features=lambda batch: {"image": batch["image"]},
        embed=embeddings,
        prefix=prefix,
    )


def main(address):
    told = {}
    with jest.Client(address, deadline_s=20) as client:
        told["unused"] = in_child(lambda: client.server_info().version)
        job = client.create_job("run-1", reference_model="reference", policy=POLICY)
        told["used"] = in_child(client.server_info)
        told["closed in the child"] = in_child(client.close)
        told["parent afterwards"] = timed(lambda: client.server_info().version)
        loop = iter(loop_over(job, [super_batch(step) for step in range(3)], "a"))
        next(loop)
        told["running loop"] = in_child(lambda: next(loop))
        told["loop closed in the child"] = in_child(loop.close)
        loop.close()
        loader = DataLoader(Rows(), batch_size=8, num_workers=2)
        told["workers that load"] = timed(lambda: [batch["keys"] for batch in loop_over(job, loader, "b")])
        small = DataLoader(Rows(), batch_size=8)
        chosen = jest.SelectedIndices(loop_over(job, small, "c"), lambda batch: [int(key[1:]) for key in batch["keys"]])
        loader = DataLoader(Rows(), batch_sampler=chosen, num_workers=2)
        told["workers that load what was chosen"] = timed(lambda: [[b["keys"] for b in loader] for _ in range(2)])
        loader = DataLoader(Rows(client), batch_size=8, num_workers=1)
        told["workers that call"] = timed(lambda: next(iter(loader)))
    print(json.dumps(told))  # noqa: T201 - how the tests learn it


if __name__ == "__main__":
    main(sys.argv[1])
