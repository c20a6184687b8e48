"""Shards: the pieces of uploads that scorers embed, and the queues in which they wait."""

from __future__ import annotations

from dataclasses import dataclass

from jest_server.domain.frozen_model import FrozenModel
from jest_server.domain.super_batches import SuperBatchRef


@dataclass(frozen=True)
class Shard:
    """A piece of an upload that a scorer embeds in one go.

    `features` holds `blobs.pack`-ed input tensors, row i belonging to `keys[i]`.
    """

    shard_id: str
    job: str
    super_batch_id: str
    reference_model: str
    reference_version: str
    keys: tuple[str, ...]
    features: bytes
    traceparent: str = ""
    """Of the span that queued it, in W3C form; empty without tracing."""

    @property
    def ref(self) -> SuperBatchRef:
        """Return the name of its super-batch."""
        return SuperBatchRef(self.job, self.super_batch_id)

    @property
    def name(self) -> str:
        """Return its name, which no other shard has: JOB/ID/SHARD."""
        return f"{self.job}/{self.super_batch_id}/{self.shard_id}"


@dataclass(frozen=True)
class Claim:
    """A shard that a consumer scores; `deliveries` counts the claims of it so far, with this one."""

    shard: Shard
    deliveries: int
    queued_at_s: float
    """First enqueue time (producer's clock); unaffected by reclaim or release."""


@dataclass(frozen=True)
class ShardResult:
    """The reference embeddings of a shard's keys: `[len(keys), 2, D]` f16 bytes, image before text."""

    keys: tuple[str, ...]
    embeddings: bytes
    inferred: int
    """Keys of these that the reference model had to compute; the others were cached in the meantime."""


class QueueState(FrozenModel):
    """The queue in which shards wait for one version of a reference model."""

    model: str
    version: str
    waiting: dict[str, int]
    """Shards that wait, by job; only jobs with some."""
    scoring: int
    """Shards that a scorer has claimed."""
