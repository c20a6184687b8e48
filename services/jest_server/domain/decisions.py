"""The recorded outcome of a super-batch."""

from __future__ import annotations

from dataclasses import dataclass

from jest_server.domain.policies import Fallback, PolicySpec
from jest_server.domain.references import ReferenceInfo
from jest_server.domain.super_batches import SuperBatchRecord

DECISIONS_KEPT = 10_000
"""Of each job, unless a deployment says otherwise."""


class Decision(SuperBatchRecord):
    """The recorded outcome of one super-batch: enough, with the inputs, to compute it again."""

    policy: PolicySpec
    seed: int
    reference: ReferenceInfo | None
    learner_digests: dict[int, str]
    submission_digests: dict[int, str]
    positions: dict[int, tuple[int, ...]]
    """By rank: its own rows in order of choice."""
    weights: dict[int, tuple[float, ...]] | None = None
    """By rank, in the order of its positions; None unless the policy asks for them."""
    step: int
    gain: float | None = None
    """At this step; None in records from before it was kept, when it was the policy's."""
    sub_batch_size: int
    super_batch_size: int
    perplexity: tuple[float, ...]
    cache_hits: int
    reference_inferences: int
    fallback: Fallback | None
    fallback_reason: str
    timings_s: dict[str, float]
    decided_at_s: float


@dataclass(frozen=True)
class Retention:
    """How long decisions are kept, and how many of a job at most."""

    seconds: float
    count: int
