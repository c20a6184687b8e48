"""Finds the reference embeddings of a whole super-batch: what scorers computed for it, and what the cache holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from jest_server.errors import ReferenceMissing

if TYPE_CHECKING:
    from jest_server.model import SuperBatch
    from jest_server.ports import EmbeddingCache, SuperBatchStore


@dataclass(frozen=True)
class Joined:
    """``[B, 2, D]`` f16, ranks one after the other, image before text; and where they came from."""

    embeddings: torch.Tensor
    cache_hits: int
    inferences: int


async def join_reference(store: SuperBatchStore, cache: EmbeddingCache, super_batch: SuperBatch) -> Joined:
    """Joins the reference embeddings of all rows, in row order.

    Raises:
        ReferenceMissing: If some rows have none, because they were evicted since submission or never uploaded.
    """
    results = await store.get_results(super_batch.job, super_batch.super_batch_id)
    value_bytes = super_batch.reference.value_bytes
    found: dict[str, bytes | memoryview] = {}
    for result in results:
        view = memoryview(result.embeddings)
        found |= {key: view[i * value_bytes : (i + 1) * value_bytes] for i, key in enumerate(result.keys)}
    ranks = range(super_batch.world_size)
    keys = [key for rank in ranks for key in super_batch.submissions[rank].keys]
    unscored = list({key: None for key in keys if key not in found})
    cached = await cache.get(super_batch.reference, unscored)
    found |= {key: value for key, value in zip(unscored, cached, strict=True) if value is not None}
    lacking = sum(key not in found for key in keys)
    if lacking:
        raise ReferenceMissing(
            f"{lacking} of {len(keys)} rows of super-batch {super_batch.super_batch_id!r} have no reference embedding: "
            "evicted since submission, or never uploaded; submit again and upload the rows that the answer names",
            {"job": super_batch.job, "super_batch_id": super_batch.super_batch_id, "rows": str(lacking)},
        )
    flat = np.frombuffer(bytearray().join(found[key] for key in keys), np.float16)
    inferences = sum(result.inferred for result in results)
    return Joined(
        torch.from_numpy(flat.reshape(len(keys), 2, super_batch.reference.embedding_width)),
        cache_hits=len(keys) - inferences,
        inferences=inferences,
    )
