"""Super-batches that will never get a decision, and why."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from jest_server.domain.super_batches import SuperBatchRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jest_server.domain.super_batches import SuperBatchRef


SUPERSEDED = "SUPERSEDED"


class RequeueStatus(enum.Enum):
    """What became of a dead letter that was to be queued again."""

    REQUEUED = "requeued"
    NO_LETTER = "none"
    FORGOTTEN = "forgotten"
    """What was submitted is not kept any more."""
    JOB_FULL = "job"
    TENANT_FULL = "tenant"
    SERVER_FULL = "server"


class DeadLetter(SuperBatchRecord):
    """A super-batch that will never get a decision, and why."""

    reason: str
    detail: str
    at_s: float

    @classmethod
    def of(cls, ref: SuperBatchRef, *, reason: str, detail: str, at_s: float) -> DeadLetter:
        """Write the dead letter of a super-batch."""
        return cls(job=ref.job, super_batch_id=ref.super_batch_id, reason=reason, detail=detail, at_s=at_s)

    @classmethod
    def expired(cls, ref: SuperBatchRef, *, at_s: float) -> DeadLetter:
        """Write the dead letter of a super-batch without a decision at its deadline."""
        return cls.of(ref, reason="EXPIRED", detail="no decision within the job's super_batch_ttl", at_s=at_s)

    @classmethod
    def superseded(cls, ref: SuperBatchRef, current: str, *, at_s: float) -> DeadLetter:
        """Return the dead letter of a super-batch whose attempt another one has taken the place of."""
        detail = f"its job runs in attempt {current!r} now, which a newer process opened"
        return cls.of(ref, reason=SUPERSEDED, detail=detail, at_s=at_s)

    @classmethod
    def unserved(
        cls, ref: SuperBatchRef, *, model: str, version: str, current: Sequence[str], at_s: float
    ) -> DeadLetter:
        """Write the dead letter of a super-batch whose reference model is served in other versions only."""
        detail = f"reference model {model!r} is not served in version {version!r} any more, but in {sorted(current)}"
        return cls.of(ref, reason="REFERENCE_CHANGED", detail=detail, at_s=at_s)
