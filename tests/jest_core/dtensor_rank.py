"""One of two ranks with distributed tensors: prints what `Embeddings` makes of them as JSON. Arguments: rank, store."""

from __future__ import annotations

import json
import sys

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from jest_core import Embeddings

ROWS = torch.arange(8.0).reshape(2, 4)


def main(rank, store):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    image = distribute_tensor(ROWS, mesh, [Shard(1)])
    scale = distribute_tensor(torch.tensor([10.0, 10.0]), mesh, [Shard(0)])[:1]
    embeddings = Embeddings(
        image, distribute_tensor(ROWS, mesh, [Replicate()]), scale, distribute_tensor(torch.tensor(-2.0), mesh)
    )
    summed = Embeddings(DTensor.from_local(ROWS / 2, mesh, [Partial()]), ROWS, 1.0)
    try:
        Embeddings(distribute_tensor(ROWS, mesh, [Shard(0)]), ROWS, 1.0)
        refused = ""
    except ValueError as error:
        refused = str(error)
    values = [embeddings.image, embeddings.text, summed.image]
    plain = all(type(value) is torch.Tensor for value in values)
    gathered = [value.tolist() for value in values]
    print(json.dumps([plain, gathered, embeddings.scale, embeddings.bias, refused]))  # noqa: T201 - how the test learns it
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
