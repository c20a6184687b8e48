"""A super-batch in flight: what its ranks submitted, and the limits on how much may be there."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from jest_server.domain.frozen_model import FrozenModel
from jest_server.domain.references import ReferenceInfo

SuperBatchId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
MAX_KEY_BYTES = 512
"""Of an example key, in UTF-8."""


@dataclass(frozen=True)
class SuperBatchRef:
    """Name a super-batch: its job, as the server calls it, and its id within that job."""

    job: str
    super_batch_id: str

    def __str__(self) -> str:
        return f"super-batch {self.super_batch_id!r} of job {self.job!r}"

    @property
    def metadata(self) -> dict[str, str]:
        """Return the ids as errors and logs carry them."""
        return {"job": self.job, "super_batch_id": self.super_batch_id}


@dataclass(frozen=True)
class RankRef:
    """Name one rank's part of a super-batch."""

    ref: SuperBatchRef
    rank: int

    @property
    def metadata(self) -> dict[str, str]:
        """Return the ids as errors and logs carry them."""
        return self.ref.metadata | {"rank": str(self.rank)}


class SuperBatchRecord(FrozenModel):
    """What is kept of one super-batch, under its name."""

    job: str
    super_batch_id: str

    @property
    def ref(self) -> SuperBatchRef:
        """Return the name of the super-batch."""
        return SuperBatchRef(self.job, self.super_batch_id)


class Submission(SuperBatchRecord):
    """One rank's rows of a super-batch as it submits them; the selector adds `reference` and `digest` once checked."""

    rank: int
    world_size: int
    keys: tuple[str, ...]
    step: int
    group_labels: tuple[str, ...] = ()
    """One for each key, empty for a row of no group; or none at all."""
    sources: tuple[str, ...] = Field(default=(), exclude=True)
    """One for each key, empty for a row whose features are uploaded; or none at all. Not stored."""
    reference: ReferenceInfo | None = None
    """None if the job has none."""
    digest: str = ""
    """Name of the content; equal for a retry."""

    @property
    def metadata(self) -> dict[str, str]:
        """Return the ids as errors and logs carry them."""
        return RankRef(self.ref, self.rank).metadata


class SuperBatch(SuperBatchRecord):
    """What the store knows of a super-batch in flight."""

    world_size: int
    reference: ReferenceInfo | None
    created_at_s: float
    step: int
    submissions: dict[int, Submission]
    uploads: dict[int, dict[str, tuple[int, ...]]]
    """By rank: upload digest -> the positions it brought."""
    pending_shards: int
    """Shards queued or being scored."""


class SubmitStatus(enum.Enum):
    """What became of a submission."""

    ACCEPTED = "accepted"
    REPEATED = "repeated"
    CONFLICT = "conflict"
    JOB_FULL = "job"
    TENANT_FULL = "tenant"
    SERVER_FULL = "server"
    DECIDED = "decided"
    DEAD = "dead"


@dataclass(frozen=True)
class SubmitResult:
    """What became of a submission, and what the first rank pinned for all ranks of its super-batch."""

    status: SubmitStatus
    reference: ReferenceInfo | None = None
    """Pinned reference model; None if the job has none or the super-batch is not in flight."""
    step: int | None = None
    """Training step of the super-batch in flight."""
    uploaded: frozenset[int] = frozenset()
    """Positions of this rank's rows that were uploaded before."""


class UploadStatus(enum.Enum):
    """What became of an upload."""

    ACCEPTED = "accepted"
    REPEATED = "repeated"
    GONE = "gone"
    """The super-batch is not in flight any more."""
    JOB_FULL = "job"
    TENANT_FULL = "tenant"
    SERVER_FULL = "server"


@dataclass(frozen=True)
class Limits:
    """Amounts of one kind that a job, a tenant and the whole server hold, or may hold; a limit of 0 is none."""

    job: int = 0
    tenant: int = 0
    server: int = 0

    def first_exceeded(self, held: Limits, *, more: int) -> Literal["job", "tenant", "server"] | None:
        """Return which of these limits does not allow `more` beside what is held."""
        if 0 < self.job < held.job + more:
            return "job"
        if 0 < self.tenant < held.tenant + more:
            return "tenant"
        return "server" if 0 < self.server < held.server + more else None


@dataclass(frozen=True)
class SuperBatchEvent:
    """A super-batch had a shard scored or left flight, so a waiting selector should look at it again."""

    ref: SuperBatchRef
