"""Super-batches that will never get a decision, and why."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from jest_server.domain.frozen_model import FrozenModel

if TYPE_CHECKING:
    from collections.abc import Sequence


class RequeueStatus(enum.Enum):
    """What became of a dead letter that was to be queued again."""

    REQUEUED = "requeued"
    NO_LETTER = "none"
    FORGOTTEN = "forgotten"
    """What was submitted is not kept any more."""
    JOB_FULL = "job"
    TENANT_FULL = "tenant"
    SERVER_FULL = "server"


class DeadLetter(FrozenModel):
    """A super-batch that was set aside, and why."""

    job: str
    super_batch_id: str
    reason: str
    detail: str
    at_s: float

    @classmethod
    def expired(cls, job: str, super_batch_id: str, *, at_s: float) -> DeadLetter:
        """Writes the letter of a super-batch that nobody decided in time."""
        detail = "no decision within the job's super_batch_ttl"
        return cls(job=job, super_batch_id=super_batch_id, reason="EXPIRED", detail=detail, at_s=at_s)

    @classmethod
    def unserved(
        cls, job: str, super_batch_id: str, *, model: str, version: str, current: Sequence[str], at_s: float
    ) -> DeadLetter:
        """Writes the letter of a super-batch whose version of the reference model is gone while another is served."""
        detail = f"reference model {model!r} is not served in version {version!r} any more, but in {sorted(current)}"
        return cls(job=job, super_batch_id=super_batch_id, reason="REFERENCE_CHANGED", detail=detail, at_s=at_s)
