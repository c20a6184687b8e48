"""How shards and their results are stored: a description in JSON, then the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jest_server.domain.shards import Shard, ShardResult
from jest_server.stores import blobs

if TYPE_CHECKING:
    from jest_server.domain.super_batches import SuperBatchRef


def pack_shard(shard: Shard) -> bytes:
    """Return what a shard's features key holds."""
    description: dict[str, Any] = {
        "model": shard.reference_model,
        "version": shard.reference_version,
        "keys": shard.keys,
    }
    if shard.traceparent:
        description["traceparent"] = shard.traceparent
    return blobs.pack(description, shard.features)


def unpack_shard(ref: SuperBatchRef, shard_id: str, blob: bytes) -> Shard:
    """Return the shard of this name from what its features key holds."""
    description, features = blobs.unpack(blob)
    return Shard(
        shard_id=shard_id,
        job=ref.job,
        super_batch_id=ref.super_batch_id,
        reference_model=description["model"],
        reference_version=description["version"],
        keys=tuple(description["keys"]),
        features=bytes(features),
        traceparent=description.get("traceparent", ""),
    )


def pack_result(result: ShardResult) -> bytes:
    """Return what a field of a super-batch's results holds."""
    return blobs.pack({"keys": result.keys, "inferred": result.inferred}, result.embeddings)


def unpack_result(blob: bytes) -> ShardResult:
    """Return the result that a field of a super-batch's results holds."""
    description, data = blobs.unpack(blob)
    return ShardResult(keys=tuple(description["keys"]), embeddings=bytes(data), inferred=description["inferred"])
