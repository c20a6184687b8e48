"""A learner small enough that a step costs milliseconds, data for it, and how it meets the server."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import jest_trainer
from jest_core import Embeddings


class TinyLearner(nn.Module):
    """Two linear towers with SigLIP's scale and bias."""

    def __init__(self, *, seed: int, width: int = 24) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.image = nn.Linear(3 * 32 * 32, width)
            self.words = nn.Embedding(1000, width)
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    def forward(self, batch):
        image = functional.normalize(self.image(batch["image"].flatten(1) / 255.0), dim=1)
        return image, functional.normalize(self.words(batch["tokens"]).mean(1), dim=1)

    def embed(self, batch) -> Embeddings:
        with torch.no_grad():
            image, text = self(batch)
        return Embeddings(image, text, scale=10.0, bias=-5.0)

    def step(self, batch) -> float:
        return sigmoid_step(self.optimizer, *self(batch), scale=10.0, bias=-5.0)


def sigmoid_step(optimizer, image, text, *, scale: float, bias: float) -> float:
    """Trains once, by the pairwise sigmoid loss."""
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(len(logits)) - 1
    loss = -functional.logsigmoid(signs * logits).sum() / len(logits)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def super_batches(*, count: int, rows: int, seed: int):
    """Yields super-batches of pairs whose keys nobody else uses."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        yield {
            "keys": [f"{seed}-{number}-{row}" for row in range(rows)],
            "image": torch.randint(0, 256, (rows, 3, 32, 32), generator=generator, dtype=torch.uint8),
            "tokens": torch.randint(1, 1000, (rows, 16), generator=generator, dtype=torch.int32),
        }


def selected(job, learner, batches, **options) -> jest_trainer.SelectedBatches:
    """Reduces super-batches such as those above to what the server chooses of them for the learner."""
    return jest_trainer.SelectedBatches(
        job,
        batches,
        keys=lambda batch: batch["keys"],
        features=lambda batch: {"image": batch["image"], "tokens": batch["tokens"]},
        embed=learner.embed,
        **options,
    )
