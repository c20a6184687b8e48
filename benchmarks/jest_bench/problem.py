"""The super-batches that the benchmarks select from: clustered pairs, as a learner and a better reference see them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from jest_core import Embeddings

ROWS_PER_CLUSTER = 16
LEARNER_NOISE, REFERENCE_NOISE = 1.0, 0.5
LEARNER_SCALE, REFERENCE_SCALE, BIAS = 30.0, 60.0, -10.0


@dataclass(frozen=True)
class SuperBatch:
    """One super-batch's embeddings, float32 ``[B, D]`` on the CPU."""

    learner: Embeddings
    reference: Embeddings


def super_batch(rows: int, width: int, *, seed: int = 0) -> SuperBatch:
    """Makes ``rows`` pairs around common centres: hard negatives exist, and the reference tells pairs apart better."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(centres: Tensor, noise: float) -> Tensor:
        noises = torch.randn(rows, width, generator=generator).mul_(noise / width**0.5)
        return normalize(noises.add_(centres), dim=1)

    clusters = normalize(torch.randn(max(rows // ROWS_PER_CLUSTER, 1), width, generator=generator), dim=1)
    cluster_of_row = torch.randint(len(clusters), (rows,), generator=generator)
    centres = noisy(clusters[cluster_of_row], 1.0)
    models = []
    for noise, scale in ((LEARNER_NOISE, LEARNER_SCALE), (REFERENCE_NOISE, REFERENCE_SCALE)):
        models.append(Embeddings(noisy(centres, noise), noisy(centres, noise), scale, BIAS))
    return SuperBatch(*models)
