"""Every metric of every server process: one prefix, base units, and no label whose values a client can invent.

The names of jobs are the one exception, and bounded: see ``job_metrics``. docs/metrics.md is made from these objects by
`jest-server metrics`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from jest_server.domain.inference import Outcome
from jest_server.runtime.job_metrics import FALLBACKS, SELECTOR_REASONS, JobMetrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from jest_server.domain.dead_letters import DeadLetter
    from jest_server.domain.decisions import Decision
    from jest_server.domain.storage import CacheStats, MemoryUse

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_NATS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_CANDIDATES = (
    *(1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1_000, 2_000, 3_000, 5_000),
    *(10_000, 30_000, 100_000, 300_000),
)


LABELS: Final = {
    "code": "gRPC status, or HTTP status",
    "fallback": "`none`, `uniform` or `hard_learner`",
    "jest_job": "a live job; `_other` for all that are over JEST_METRICS_JOBS",
    "kind": "`read`, `listing`, `timeout` and the like: constants of the code",
    "limit": "the setting whose limit was reached, such as `JEST_MAX_CALLS_PER_S_PER_JOB` or `max_in_flight`; `none`",
    "method": "gRPC method, or HTTP method",
    "outcome": "`scored` or `dead_lettered`; of an inference `ok` or the kind of its failure",
    "phase": "`load`, `embed`, `select` or `train`",
    "reason": "constants of the code, as errors and dead letters carry them",
    "route": "route as the API describes it, `none` where there is none",
    "rows": "`chosen` or `dropped`",
    "stage": "`wait_learner`, `wait_reference`, `queue`, `compute` or `record`",
    "store": "`queue` or `cache`",
}
"""What the labels' values are."""


class RpcMetrics:
    """What every gRPC server counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.duration = Histogram(
            "jest_rpc_duration_seconds",
            "Time from a call's start to its answer.",
            ["method", "code"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.refusals = Counter(
            "jest_rpc_refusals",
            "Calls refused, by the error's reason: RATE_LIMITED and QUEUE_FULL are limits, TOKEN_* are strangers.",
            ["method", "reason", "limit"],
            registry=registry,
        )


class ControlMetrics:
    """What the REST service counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.duration = Histogram(
            "jest_http_request_duration_seconds",
            "Time from a request's start to its answer.",
            ["method", "route", "code"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.refusals = Counter(
            "jest_http_refusals",
            "Requests refused before they reached a route, by the error's reason.",
            ["reason", "limit"],
            registry=registry,
        )


class EmbeddingFileMetrics:
    """What a process knows of the embeddings in files behind its cache."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.hits = Counter(
            "jest_embedding_file_hits", "Reference embeddings that were found in files.", registry=registry
        )
        self.problems = Counter(
            "jest_embedding_file_problems",
            "Files, manifests and rows that could not be used, by what was wrong.",
            ["kind"],
            registry=registry,
        )
        self.rows = Gauge("jest_embedding_file_rows", "Rows of the files that are listed.", registry=registry)


class SelectorMetrics:
    """What the selector knows; at most ``max_jobs`` jobs have series of their own."""

    def __init__(self, registry: CollectorRegistry, *, max_jobs: int = 100) -> None:
        self.rpc = RpcMetrics(registry)
        self.jobs = JobMetrics(registry, limit=max_jobs)
        self.embedding_files = EmbeddingFileMetrics(registry)
        self.decisions = Counter(
            "jest_selector_decisions",
            "Decisions recorded, by the fallback that was used.",
            ["fallback"],
            registry=registry,
        )
        self.dead_letters = Counter(
            "jest_selector_dead_letters", "Super-batches dead-lettered.", ["reason"], registry=registry
        )
        self.stage = Histogram(
            "jest_selector_stage_duration_seconds",
            "Time of each stage of a selection.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        _start_at_zero(self.decisions, FALLBACKS)
        _start_at_zero(self.dead_letters, SELECTOR_REASONS)
        self.examples_loaded = Counter(
            "jest_selector_examples_loaded", "Examples in decided super-batches.", registry=registry
        )
        self.examples_selected = Counter(
            "jest_selector_examples_selected", "Examples chosen for training.", registry=registry
        )
        self.cache_hits = Counter(
            "jest_selector_reference_cache_hits", "Reference embeddings that needed no inference.", registry=registry
        )
        self.inferences = Counter(
            "jest_selector_reference_inferences", "Reference embeddings that were computed.", registry=registry
        )
        self.perplexity = Histogram(
            "jest_selector_sampling_perplexity",
            "Effective number of candidates of each chunk's sampling distribution.",
            buckets=_CANDIDATES,
            registry=registry,
        )
        self.learnability = Histogram(
            "jest_selector_learnability_gap",
            "Learnability in nats of a row's own pair: mean of the chosen rows of a decision less that of the dropped; "
            "observations below 0 count as 0.",
            buckets=_NATS,
            registry=registry,
        )
        self.step_seconds = Counter(
            "jest_trainer_step_seconds",
            "Where the time of trainers' steps went, as the SDK tells: load waits for the next super-batch to be "
            "loaded and submitted, embed is the learner's pass over it, select waits for the decision, train is all "
            "the rest.",
            ["phase"],
            registry=registry,
        )
        self.steps = Counter("jest_trainer_steps", "Steps of single ranks that those times are of.", registry=registry)
        _start_at_zero(self.step_seconds, ("load", "embed", "select", "train"))
        self.memory = Gauge("jest_redis_memory_bytes", "Memory that a Redis uses.", ["store"], registry=registry)
        self.max_memory = Gauge(
            "jest_redis_max_memory_bytes", "Memory that it may use; 0: no limit.", ["store"], registry=registry
        )
        self.evictions = Gauge(
            "jest_redis_evicted_values", "Values the cache has evicted since it started.", registry=registry
        )
        self.pending_selections = Gauge(
            "jest_selector_pending_selections",
            "Selections that wait for learner outputs or embeddings.",
            registry=registry,
        )
        self.held_bytes = Gauge(
            "jest_selector_held_bytes", "Learner outputs held, in memory or in scratch files.", registry=registry
        )
        self.queue_depth = Gauge("jest_queue_shards", "Shards queued or being scored.", registry=registry)
        self.queue_age = Gauge(
            "jest_queue_oldest_age_seconds", "Age of the oldest shard queued or being scored.", registry=registry
        )

    def decided(
        self, decision: Decision, stages_s: Mapping[str, float], learnability: tuple[float, float] | None
    ) -> None:
        """Counts a decision; ``learnability`` is that of chosen and dropped rows, where they were chosen by it."""
        self.decisions.labels(decision.fallback or "none").inc()
        self.jobs.decided(decision, stages_s, learnability)
        if learnability is not None:
            chosen, dropped = learnability
            self.learnability.observe(max(0.0, chosen - dropped))
        for stage, seconds in stages_s.items():
            self.stage.labels(stage).observe(seconds)
        self.examples_loaded.inc(decision.super_batch_size)
        self.examples_selected.inc(decision.sub_batch_size)
        self.cache_hits.inc(decision.cache_hits)
        self.inferences.inc(decision.reference_inferences)
        for perplexity in decision.perplexity:
            self.perplexity.observe(perplexity)

    def dead_lettered(self, letter: DeadLetter) -> None:
        """Count a dead-lettered super-batch."""
        self.dead_letters.labels(letter.reason).inc()
        self.jobs.dead_lettered(letter.job, letter.reason)

    def stepped(self, job: str, phases_s: Mapping[str, float]) -> None:
        """Counts where the time of one rank's step went."""
        self.steps.inc()
        for phase, seconds in phases_s.items():
            self.step_seconds.labels(phase).inc(seconds)
        self.jobs.stepped(job, phases_s)

    def observe_memory(self, queue: MemoryUse, cache: CacheStats) -> None:
        """Keeps what the two stores say of themselves."""
        for store, used, limit in (
            ("queue", queue.used_bytes, queue.max_bytes),
            ("cache", cache.used_bytes, cache.max_bytes),
        ):
            self.memory.labels(store).set(used)
            self.max_memory.labels(store).set(limit)
        self.evictions.set(cache.evicted)


class ScorerMetrics:
    """What a scorer knows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.rpc = RpcMetrics(registry)
        self.embedding_files = EmbeddingFileMetrics(registry)
        self.shards = Counter(
            "jest_scorer_shards", "Shards taken, by what became of them.", ["outcome"], registry=registry
        )
        self.dead_letters = Counter(
            "jest_scorer_dead_letters", "Super-batches dead-lettered.", ["reason"], registry=registry
        )
        self.shard_duration = Histogram(
            "jest_scorer_shard_duration_seconds",
            "Time from claim to completion of a shard.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.cache_hits = Counter(
            "jest_scorer_cache_hits", "Examples that were cached when their shard was taken.", registry=registry
        )
        self.inferred = Counter(
            "jest_scorer_inferred_examples", "Examples embedded by the reference model.", registry=registry
        )
        self.inference_duration = Histogram(
            "jest_scorer_inference_duration_seconds",
            "Time of one inference request to the reference model.",
            ["outcome"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.inference_examples = Counter(
            "jest_scorer_inference_examples",
            "Examples in inference requests, repeated requests included.",
            ["outcome"],
            registry=registry,
        )
        self.extra_passes = Counter(
            "jest_scorer_extra_passes",
            "Inferences over halves of a batch that failed, made to find the examples that it failed for.",
            registry=registry,
        )
        _start_at_zero(self.shards, ("scored", "dead_lettered"))
        _start_at_zero(self.inference_examples, [outcome.value for outcome in Outcome])
        _start_at_zero(self.dead_letters, ("TOO_MANY_DELIVERIES", "INFERENCE_REFUSED", "INFERENCE_FAILED"))
        self.reclaimed = Counter(
            "jest_scorer_reclaimed_shards", "Shards reclaimed from a scorer that sent no heartbeat.", registry=registry
        )
        self.reference_ready = Gauge(
            "jest_scorer_reference_ready", "1 while a real inference of the reference model works.", registry=registry
        )
        self.fingerprint_mismatches = Counter(
            "jest_scorer_reference_fingerprint_mismatches",
            "Comparisons in which the reference model was not the one that its version was at first: it is refused.",
            registry=registry,
        )
        self.in_hand = Gauge("jest_scorer_shards_in_hand", "Shards being scored.", registry=registry)


def _start_at_zero(counter: Counter, values: Iterable[str]) -> None:
    """Lets a counter be there before it first counts, or Prometheus would not see that first time as a rise."""
    for value in values:
        counter.labels(value)


def expose(registry: CollectorRegistry, listen: str) -> int:
    """Serves the metrics over HTTP at ``host:port`` from a thread and returns the port."""
    host, _, port = listen.rpartition(":")
    server, _ = start_http_server(int(port), addr=host, registry=registry)
    return int(server.server_port)
