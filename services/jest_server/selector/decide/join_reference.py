"""The reference embeddings of a whole super-batch: what scorers computed for it, and what the cache holds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from jest_server.domain.errors import ReferenceMissing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from jest_server.domain.ports import EmbeddingCache, SuperBatchStore
    from jest_server.domain.shards import ShardResult
    from jest_server.domain.super_batches import SuperBatch


_COPY_BYTES = 1 << 20
"""Copied in one step: no more, because nothing else of this process runs meanwhile, whatever the thread."""


@dataclass(frozen=True)
class JoinedReference:
    """`[2, B, D]` f16, image before text, ranks one after the other; and where they came from."""

    embeddings: torch.Tensor
    cache_hits: int
    inferences: int


async def join_reference(
    super_batches: SuperBatchStore, cache: EmbeddingCache, super_batch: SuperBatch
) -> JoinedReference:
    """Join the reference embeddings of all rows, in row order.

    Raises:
        ReferenceMissing: If some rows have none, because it was evicted since submission, or never uploaded.
    """
    reference = super_batch.reference
    assert reference is not None, "a job that needs the reference model has one"
    results = await super_batches.get_results(super_batch.ref)
    keys = [key for rank in range(super_batch.world_size) for key in super_batch.submissions[rank].keys]
    found = await asyncio.to_thread(_scored, results, reference.value_bytes)
    unscored = await asyncio.to_thread(_lacking, keys, found)
    cached = await cache.for_tenant_of(super_batch.job).get(reference, unscored)
    found |= {key: value for key, value in zip(unscored, cached, strict=True) if value is not None}
    if None in cached:
        lacking = sum(key not in found for key in keys)
        raise ReferenceMissing(
            f"{lacking} of {len(keys)} rows of super-batch {super_batch.super_batch_id!r} have no reference embedding: "
            "evicted since submission, or never uploaded; submit again and upload the rows that the answer names",
            super_batch.ref.metadata | {"rows": str(lacking)},
        )
    joined = await asyncio.to_thread(_joined, keys, found, reference.embedding_width)
    inferences = sum(result.inferred for result in results)
    return JoinedReference(torch.from_numpy(joined), cache_hits=len(keys) - inferences, inferences=inferences)


# Each of these looks at every row, so it runs in a thread: the event loop answers other calls meanwhile.


def _scored(results: Sequence[ShardResult], value_bytes: int) -> dict[str, bytes | memoryview]:
    """Return by key what scorers computed for the super-batch, as views."""
    found: dict[str, bytes | memoryview] = {}
    for result in results:
        view = memoryview(result.embeddings)
        found |= {key: view[i * value_bytes : (i + 1) * value_bytes] for i, key in enumerate(result.keys)}
    return found


def _lacking(keys: Sequence[str], found: Mapping[str, bytes | memoryview]) -> list[str]:
    """Return the distinct keys that are not found, in order."""
    return list({key: None for key in keys if key not in found})


def _joined(keys: Sequence[str], found: Mapping[str, bytes | memoryview], width: int) -> npt.NDArray[np.float16]:
    """Copy the keys' values one after the other, images and texts apart: `[2, len(keys), width]`."""
    joined = np.empty((2, len(keys), width), np.float16)
    step = max(1, _COPY_BYTES // (joined.itemsize * 2 * width))
    for start in range(0, len(keys), step):
        piece = b"".join(found[key] for key in keys[start : start + step])
        values = np.frombuffer(piece, np.float16).reshape(-1, 2, width)
        joined[:, start : start + len(values)] = values.swapaxes(0, 1)
    return joined
