"""The server's own vocabulary: what a job, a super-batch, a shard and a decision are, apart from any wire or store."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

if TYPE_CHECKING:
    from collections.abc import Sequence

JobName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
"""What a client may call a job."""
ScopedJobName = Annotated[
    str, StringConstraints(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,62}~)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
]
"""What the server calls it: a tenant's jobs bear the tenant's name in front."""
SuperBatchId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
DECISIONS_KEPT = 10_000
"""Of each job, unless a deployment says otherwise."""
MAX_KEY_BYTES = 512
"""Of an example key, in UTF-8."""
Fallback = Literal["fail", "uniform", "hard_learner"]


class Record(BaseModel):
    """Immutable, strict about unknown fields, kept as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ScheduleSpec(Record):
    """A number that depends on the step, in plain JSON types; jest_core gives it meaning."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    start: float
    end: float | None = None
    steps: int | None = None
    warmup_steps: int = 0


class PolicySpec(Record):
    """A selection policy in plain JSON types; jest_core gives it meaning and checks the combinations."""

    scoring: Literal["learnability", "easy_reference", "hard_learner", "uniform"] = "learnability"
    loss: Literal["sigmoid", "softmax", "pairwise", "per_example"] = "sigmoid"
    sub_batch_size: int | None = Field(default=None, ge=1)
    filter_ratio: str | None = None
    filter_ratio_schedule: ScheduleSpec | None = None
    num_chunks: int = Field(default=16, ge=1)
    gain: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Left alone where there is a gain_schedule."""
    gain_schedule: ScheduleSpec | None = None
    normalization: Literal["sum", "mean"] = "sum"
    sampler: Literal["gumbel", "top_k"] = "gumbel"
    placement: Literal["per_rank", "global"] = "per_rank"
    max_per_group: int | None = Field(default=None, ge=1)
    weights: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"

    @property
    def scores_learner(self) -> bool:
        """Whether what the learner says of the rows counts."""
        return self.scoring in {"learnability", "hard_learner"}

    @property
    def scores_reference(self) -> bool:
        """Whether the reference's losses count."""
        return self.scoring in {"learnability", "easy_reference"}

    @property
    def needs_reference_model(self) -> bool:
        """Whether the server has to embed the rows; losses of single examples come with the learner's."""
        return self.scores_reference and self.loss != "per_example"

    @property
    def is_scheduled(self) -> bool:
        """Whether something depends on the step."""
        return self.filter_ratio_schedule is not None or self.gain_schedule is not None


class JobSpec(Record):
    """All that a client decides about a job."""

    name: ScopedJobName
    reference_model: str = Field(default="", max_length=256)
    """Empty: none; only where the policy needs none."""
    policy: PolicySpec
    world_size: int = Field(default=1, ge=1, le=4096)
    seed: int = Field(default=0, ge=0, lt=2**64)
    fallback: Fallback = "fail"
    reference_timeout_s: float = Field(default=30.0, gt=0, le=3600)
    max_in_flight: int = Field(default=64, ge=1, le=100_000)
    super_batch_ttl_s: float = Field(default=600.0, ge=1, le=7 * 86400)
    weight: float = Field(default=1.0, ge=0.001, le=1000)
    """Share of the scorers, relative to other jobs', while they all wait."""


class Job(Record):
    """A registered job."""

    spec: JobSpec
    created_at_s: float


class Counters(Record):
    """A job's accounts; submitted == selected + dead_lettered + in_flight at every moment."""

    submitted: int = 0
    selected: int = 0
    dead_lettered: int = 0
    in_flight: int = 0
    fallbacks: int = 0
    examples_loaded: int = 0
    examples_selected: int = 0
    cache_hits: int = 0
    reference_inferences: int = 0


class ReferenceInput(Record):
    """One tensor that the reference model takes for an example; -1 in ``shape`` stands for any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ReferenceInfo(Record):
    """What the reference model's own configuration says about it."""

    name: str
    version: str
    preprocessing_id: str
    scale: float
    bias: float
    embedding_width: int
    inputs: tuple[ReferenceInput, ...]

    @property
    def value_bytes(self) -> int:
        """Size of one example's embeddings as they are cached and handed on: ``[2, D]`` f16."""
        return 2 * 2 * self.embedding_width


class Announced(Record):
    """A version of a reference model, as its scorers announced it."""

    reference: ReferenceInfo
    since_s: float
    """When it was announced for the first time, in seconds since 1970."""
    served: bool
    """Whether scorers serve it at the moment."""


class LineState(Record):
    """The line in which shards wait for one version of a reference model."""

    model: str
    version: str
    waiting: dict[str, int]
    """Shards that wait, by job; only jobs with some."""
    scoring: int
    """Shards in scorers' hands."""


class MemoryUse(Record):
    """What a store's server says of its memory."""

    used_bytes: int
    max_bytes: int
    """0: no limit."""


class CacheStats(Record):
    """What the embedding cache says of itself, of all models together."""

    values: int
    """Embeddings and leases held."""
    used_bytes: int
    max_bytes: int
    """0: no limit."""
    hits: int
    """Reads since it started that found a value; and the others."""
    misses: int
    evicted: int


class Submission(Record):
    """One rank's rows of a super-batch."""

    job: str
    super_batch_id: str
    rank: int
    world_size: int
    reference: ReferenceInfo | None
    """None if the job has none."""
    keys: tuple[str, ...]
    digest: str
    step: int | None = None
    group_labels: tuple[str, ...] = ()
    """One for each key, empty for a row of no group; or none at all."""


class SuperBatch(Record):
    """What the store knows of a super-batch in flight."""

    job: str
    super_batch_id: str
    world_size: int
    reference: ReferenceInfo | None
    created_at_s: float
    step: int | None = None
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


class UploadStatus(enum.Enum):
    """What became of an upload."""

    ACCEPTED = "accepted"
    REPEATED = "repeated"
    GONE = "gone"
    """The super-batch is not in flight any more."""
    JOB_FULL = "job"
    TENANT_FULL = "tenant"
    SERVER_FULL = "server"


class RequeueStatus(enum.Enum):
    """What became of a dead letter that was to be queued again."""

    REQUEUED = "requeued"
    NO_LETTER = "none"
    FORGOTTEN = "forgotten"
    """What was submitted is not kept any more."""
    JOB_FULL = "job"
    TENANT_FULL = "tenant"
    SERVER_FULL = "server"


@dataclass(frozen=True)
class Limits:
    """Amounts of one kind that a job, a tenant and the whole server hold, or may hold; a limit of 0 is none."""

    job: int = 0
    tenant: int = 0
    server: int = 0

    def whose_is_reached(self, held: Limits, *, more: int) -> Literal["job", "tenant", "server"] | None:
        """Tells which of these limits does not allow ``more`` beside what is held."""
        if 0 < self.job < held.job + more:
            return "job"
        if 0 < self.tenant < held.tenant + more:
            return "tenant"
        return "server" if 0 < self.server < held.server + more else None


@dataclass(frozen=True)
class Shard:
    """A piece of an upload that a scorer embeds in one go.

    ``features`` holds ``records.pack``-ed input tensors, row i belonging to ``keys[i]``.
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


@dataclass(frozen=True)
class Claim:
    """A shard in this consumer's hands.

    ``token`` is the queue's own handle; ``deliveries`` counts the claims so far, with this one.
    """

    shard: Shard
    token: str
    deliveries: int
    queued_at_s: float
    """When it was queued first, by the clock of who did; who took it over or gave it back changes nothing in that."""


class Lease(enum.IntEnum):
    """Who computes an embedding that is not there yet."""

    OTHERS = 0
    MINE = 1


@dataclass(frozen=True)
class ShardResult:
    """The reference embeddings of a shard's keys: ``[len(keys), 2, D]`` f16 bytes, image before text."""

    keys: tuple[str, ...]
    embeddings: bytes
    inferred: int
    """Keys of these that the reference model had to compute; the others were cached in the meantime."""


class Decision(Record):
    """The recorded outcome of one super-batch: enough, with the inputs, to compute it again."""

    job: str
    super_batch_id: str
    policy: PolicySpec
    seed: int
    reference: ReferenceInfo | None
    learner_digests: dict[int, str]
    submission_digests: dict[int, str]
    positions: dict[int, tuple[int, ...]]
    """By rank: its own rows in order of choice."""
    weights: dict[int, tuple[float, ...]] | None = None
    """By rank, in the order of its positions; None unless the policy asks for them."""
    step: int | None = None
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


class DeadLetter(Record):
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


@dataclass(frozen=True)
class News:
    """Something happened to a super-batch that a waiting selector may want to look at."""

    job: str
    super_batch_id: str
