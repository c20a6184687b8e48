"""One rank of a distributed loop: prints what it trained on as JSON. Arguments: address, rank, world size, store."""

from __future__ import annotations

import json
import sys

from torch import distributed
from trainer_samples import embeddings, super_batch

import jest_trainer as jest


def main(address, rank, world_size, store):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    with jest.Client(address, deadline_s=20) as client:
        job = client.create_job("run", reference_model="r", policy=jest.SelectionPolicy(sub_batch_size=4, num_chunks=2))
        loop = jest.SelectedBatches(
            job,
            [super_batch(10 * step + rank) for step in range(3)],
            keys=lambda batch: batch["keys"],
            features=lambda batch: {"image": batch["image"]},
            embed=embeddings,
        )
        trained = [(d.super_batch_id, batch["keys"], d.super_batch_size) for batch, d in loop.with_decisions()]
    print(json.dumps([job.world_size, trained]))  # noqa: T201 - how the test learns it
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
