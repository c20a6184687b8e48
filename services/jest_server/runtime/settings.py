"""All settings, read from the environment (prefix ``JEST_``) and nowhere else; command-line options override them."""

from __future__ import annotations

import socket
from pathlib import Path  # noqa: TC003 - pydantic needs it at run time
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from jest_server.domain.decisions import DECISIONS_KEPT


class ProcessSettings(BaseSettings):
    """What every server process needs."""

    model_config = SettingsConfigDict(env_prefix="JEST_", extra="ignore", frozen=True)

    queue_url: str = Field(default="redis://127.0.0.1:6379/0", repr=False)
    """Redis for jobs, queue and decisions. Must not evict."""
    cache_url: str = Field(default="redis://127.0.0.1:6379/1", repr=False)
    """Redis for reference embeddings. May evict."""
    cache_precision: Literal["float16", "int8"] = "float16"
    """How the cache holds reference embeddings; int8 takes half the memory. The same for selectors and scorers."""
    source_prefixes: tuple[str, ...] = ()
    """Under which URLs scorers may read examples that jobs name by reference: a JSON list such as
    ["s3://bucket/train/"]; the same for selectors and scorers."""
    share_cache: bool = False
    """Whether tenants share cached embeddings; by timing, one can tell then what another has used."""
    embeddings_url: str = ""
    """Folder or URL of reference embeddings that `jest-server embed` made: what the cache lacks is looked up there."""
    embeddings_refresh_s: float = Field(default=60.0, gt=0)
    """How often, at most, new files are looked for there."""
    embeddings_timeout_s: float = Field(default=10.0, gt=0)
    """What a lookup there may take; after that its rows count as absent."""
    listen: str = "127.0.0.1:50051"
    """Host and port of the gRPC server; port 0 takes a free one."""
    tls_certificate: Path | None = None
    """PEM of the gRPC server's certificate chain; none: no TLS. Read again when it changes, like the next two."""
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """PEM of who signs clients' certificates; with it, no one calls without one."""
    tokens_file: Path | None = None
    """Bearer tokens and their tenants; none: no call needs a token and there are no tenants."""
    max_calls_per_s: float = Field(default=0, ge=0, allow_inf_nan=False)
    """Calls that this process answers in a second, on average, to all callers; 0 here and below: as many as come."""
    max_calls_per_s_per_tenant: float = Field(default=0, ge=0, allow_inf_nan=False)
    max_calls_per_s_per_job: float = Field(default=0, ge=0, allow_inf_nan=False)
    """Of the calls that carry a job's super-batches."""
    allow_insecure: bool = False
    """Listen to other machines though there is no TLS, or nobody has to show who they are."""
    health_listen: str = ""
    """Host and port for health checks alone, in plain text and without tokens, for probes that speak no TLS."""
    metrics_listen: str = "127.0.0.1:9101"
    max_world_size: int = Field(default=4096, ge=1)
    max_jobs_per_tenant: int = Field(default=1000, ge=1)
    """Without tokens: of all."""
    tracing: bool = False
    """Record spans and send them where the OTEL_* variables say; needs the extra `tracing`."""
    log_format: Literal["json", "console"] = "json"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_delay_s: float = Field(default=0.5, ge=0)
    """How long to answer calls after health says NOT_SERVING, so that load balancers notice."""
    grace_s: float = Field(default=10.0, gt=0)
    """How long work in hand may go on after that."""


class SelectorSettings(ProcessSettings):
    """The selector's own."""

    max_message_bytes: int = Field(default=4 << 20, ge=2 << 20)
    max_rows_per_rank: int = Field(default=262_144, ge=1)
    max_tensor_bytes: int = Field(default=1 << 30, ge=1)
    """Largest sum of one call's tensors."""
    max_pair_loss_bytes: int = Field(default=4 << 30, ge=1)
    """Largest pair-loss matrix of a whole super-batch; it lies in a scratch file, not in memory."""
    scratch_dir: Path | None = None
    """Folder of the scratch files; none: the system's. They have no names there and go with the process."""
    max_held_bytes: int = Field(default=4 << 30, ge=1)
    """Learner outputs held for selections that are not decided yet, all jobs together, scratch files included, and
    features on their way to the queue."""
    max_super_batches: int = Field(default=100_000, ge=0)
    """Super-batches in flight, all jobs together; 0 here and in the next ones: as many as come."""
    max_super_batches_per_tenant: int = Field(default=0, ge=0)
    max_feature_bytes: int = Field(default=4 << 30, ge=0)
    """Features that wait in the queue's Redis for scorers, all jobs together."""
    max_feature_bytes_per_tenant: int = Field(default=0, ge=0)
    max_feature_bytes_per_job: int = Field(default=2 << 30, ge=0)
    shard_examples: int = Field(default=128, ge=1)
    """Uploads are cut into shards of this many examples, the unit that a scorer takes."""
    decision_keep_s: float = Field(default=7 * 86400.0, gt=0)
    """How long a decision is kept, unless there are newer ones of its job than the next tells."""
    decisions_kept: int = Field(default=DECISIONS_KEPT, ge=1)
    compute_threads: int = Field(default=1, ge=1)
    """Selections computed at the same time; each uses all of torch's threads."""
    device: str = "auto"
    """Where selections are computed: "auto" takes CUDA if there is one."""
    sweep_interval_s: float = Field(default=5.0, gt=0)
    metrics_jobs: int = Field(default=100, ge=0)
    """How many live jobs have metrics of their own; what further ones count is added up as one."""


class ScorerSettings(ProcessSettings):
    """The scorer's own."""

    listen: str = "127.0.0.1:50052"
    metrics_listen: str = "127.0.0.1:9102"
    reference_model: str = "jest_reference"
    reference_backend: Literal["triton", "in_process"] = "triton"
    triton_url: str = "127.0.0.1:8001"
    model_repository: Path | None = None
    """Only for the in_process backend."""
    consumer: str = Field(default_factory=lambda: f"{socket.gethostname()}")
    """Name of this scorer in the queue's consumer group; unique among live scorers."""
    preprocess: str = ""
    """MODULE:FUNCTION that makes the model's inputs of examples that were named by reference."""
    caption: str = "txt"
    """Where their captions are: txt, or json:FIELD."""
    max_source_bytes: int = Field(default=64 << 20, ge=1)
    """The largest file that is read as one."""
    concurrent_shards: int = Field(default=2, ge=1)
    microbatch: int = Field(default=64, ge=1)
    concurrent_inferences: int = Field(default=4, ge=1)
    inference_timeout_s: float = Field(default=30.0, gt=0)
    inference_lease_s: float = Field(default=10.0, gt=0)
    """How long other scorers wait for embeddings that a scorer went silent on, before one of them computes them."""
    reclaim_idle_s: float = Field(default=10.0, gt=0)
    """A shard without a heartbeat of its scorer for so long is reclaimed."""
    max_deliveries: int = Field(default=5, ge=1)
    """A shard that was reclaimed more often than this is dead-lettered with its super-batch."""
    max_attempts: int = Field(default=3, ge=1)
    """Failures of one shard, while the reference model works for others, before it is dead-lettered."""
    announce_interval_s: float = Field(default=3.0, gt=0)
    fingerprint_interval_s: float = Field(default=10.0, gt=0)
    """How often the reference model's answers to fixed probe examples are compared with those of its first load."""
    fingerprint_min_cosine: float = Field(default=0.9999, gt=0, le=1)
    """Least cosine of each probe's embeddings that counts as the same weights; batching and GPUs change last bits."""


class ControlSettings(ProcessSettings):
    """The REST service's own; ``listen`` is where it speaks HTTP."""

    listen: str = "127.0.0.1:50053"
    metrics_listen: str = "127.0.0.1:9103"


class EmbedSettings(BaseSettings):
    """Where one of many `jest-server embed` processes gets its share of the work from."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True)

    shard_index: int = Field(default=0, ge=0, validation_alias="JOB_COMPLETION_INDEX")
    """Kubernetes sets it in the pods of an indexed Job."""
    num_shards: int = Field(default=1, ge=1, validation_alias="JEST_NUM_SHARDS")
