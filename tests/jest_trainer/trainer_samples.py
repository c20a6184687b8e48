"""What the SDK's tests select from, and how they wait."""

from __future__ import annotations

import time

import torch

import jest_trainer as jest

POLICY = jest.SelectionPolicy(filter_ratio=0.75, num_chunks=2)


def until(condition, timeout_s=30.0):
    """Polls until a condition holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come to hold"
        time.sleep(0.005)


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
    first = ((row % 2) + row / 100) / 2
    image = torch.stack([first, (1 - first**2).sqrt()], dim=1)
    return jest.Embeddings(image.to(dtype), image.to(dtype), scale=10.0, bias=-1.0)


EXPECTED_ROWS = [7, 5]
"""What the scripted server chooses of `super_batch` under POLICY: the quarter with the largest embeddings."""
