"""What the API shows: the server's own records under the names by which a tenant knows its jobs, and pages of them."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from jest_server.domain import tenants
from jest_server.domain.dead_letters import DeadLetter
from jest_server.domain.decisions import Decision
from jest_server.domain.jobs import Counters, JobName, JobSpec
from jest_server.domain.policies import Fallback
from jest_server.domain.references import ReferenceInfo
from jest_server.domain.shards import QueueState

R = TypeVar("R", Decision, DeadLetter)

EXAMPLE_SPEC: dict[str, JsonValue] = {
    "name": "siglip-base-1",
    "reference_model": "jest_reference",
    "policy": {"filter_ratio": "0.8", "num_chunks": 16},
    "world_size": 8,
    "seed": 7,
    "fallback": "hard_learner",
    "weight": 2.0,
}


class View(BaseModel):
    """Immutable."""

    model_config = ConfigDict(frozen=True)


class JobRequest(JobSpec):
    """A job to register, by the name that the caller gives it."""

    name: JobName
    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_SPEC]})

    def scoped(self) -> JobSpec:
        """The spec under the name that the server uses."""
        return JobSpec(**self.model_dump() | {"name": tenants.scoped(self.name)})


class JobView(View):
    """A job, its accounts, and its reference model as it is served now."""

    spec: JobSpec
    created_at_s: float
    reference: ReferenceInfo | None = None
    counters: Counters


class JobPage(View):
    """Jobs in order of name."""

    jobs: list[JobView]
    next_after: str | None = None
    """Pass it as ``after`` for the next page; none: this is the last one."""


class DecisionSummary(View):
    """A decision without what grows with the super-batch."""

    super_batch_id: str
    step: int | None = None
    gain: float | None = None
    super_batch_size: int
    sub_batch_size: int
    perplexity: tuple[float, ...]
    cache_hits: int
    reference_inferences: int
    reference_version: str | None = None
    fallback: Fallback | None = None
    fallback_reason: str
    timings_s: dict[str, float]
    decided_at_s: float


class DecisionPage(View):
    """Decisions, the newest first."""

    decisions: list[DecisionSummary]
    next_before: str | None = None
    """Pass it as ``before`` for the next page; none: this is the last one."""


class DeadLetterPage(View):
    """The newest dead letters, the newest first."""

    dead_letters: list[DeadLetter]


class Requeued(View):
    """A super-batch that is in flight again."""

    super_batch_id: str
    deadline_s: float
    """When it is dead-lettered again unless it is decided, in seconds since 1970."""
    reference_version: str | None = None


class ReferenceView(View):
    """A version of a reference model."""

    reference: ReferenceInfo
    since_s: float
    """When scorers announced it first, in seconds since 1970."""
    served: bool
    current: bool
    """Whether new super-batches are pinned to it."""


class ReferenceList(View):
    """By model, the newest version first."""

    references: list[ReferenceView]


class QueueView(View):
    """The queue between selectors and scorers."""

    shards: int = Field(ge=0)
    """Queued or being scored, of all jobs."""
    oldest_age_s: float = Field(ge=0)
    queues: list[QueueState]
    """By version of a reference model; ``waiting`` tells of the caller's own jobs."""


class Health(View):
    """The process is there; from ``/readyz`` also: its stores answer."""

    status: str = "ok"


def unscoped_record(record: R) -> R:
    """The record with the job's name as the caller knows it."""
    return record.model_copy(update={"job": tenants.unscoped(record.job)})


def summary(decision: Decision) -> DecisionSummary:
    """Leaves out positions, weights and digests."""
    fields = decision.model_dump(include=set(DecisionSummary.model_fields))
    version = None if decision.reference is None else decision.reference.version
    return DecisionSummary(**fields, reference_version=version)
