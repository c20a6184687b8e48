"""Every metric of every server process: one prefix, base units, and no label whose values a client can invent.

The names of jobs are the one exception, and bounded: see ``JobMetrics``. docs/metrics.md is made from this file by
`jest-server metrics`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from jest_server.reference.observing import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from jest_server.model import CacheStats, Decision, MemoryUse

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_NATS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_FALLBACKS = ("none", "uniform", "hard_learner")
_SELECTOR_REASONS = ("EXPIRED", "REFERENCE_CHANGED", "UNSELECTABLE")
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
OTHER_JOBS: Final = "_other"
"""No job can be called so: names start with a letter or a digit."""
JOB_IDLE_S: Final = 3600.0


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


class JobMetrics:
    """The few series that are told apart by job.

    At most ``limit`` jobs have series of their own; what further ones count is added up under ``_other``, where gauges
    are left out. Whoever knows that a job has ended calls ``forget``: its series go, and its place is free.
    """

    def __init__(self, registry: CollectorRegistry, *, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._seen_s: dict[str, float] = {}
        job = "jest_job"
        self._decisions = Counter(
            "jest_job_decisions",
            "Decisions recorded, by the fallback that was used.",
            [job, "fallback"],
            registry=registry,
        )
        self._dead_letters = Counter(
            "jest_job_dead_letters", "Super-batches that the selector set aside.", [job, "reason"], registry=registry
        )
        self._loaded = Counter(
            "jest_job_examples_loaded", "Examples in decided super-batches.", [job], registry=registry
        )
        self._selected = Counter(
            "jest_job_examples_selected", "Examples chosen for training.", [job], registry=registry
        )
        self._hits = Counter(
            "jest_job_reference_cache_hits", "Reference embeddings that needed no inference.", [job], registry=registry
        )
        self._inferences = Counter(
            "jest_job_reference_inferences", "Reference embeddings that were computed.", [job], registry=registry
        )
        self._stages = Counter(
            "jest_job_stage_seconds", "Time in each stage of its selections.", [job, "stage"], registry=registry
        )
        self._steps = Counter(
            "jest_job_trainer_seconds",
            "Where its ranks' time went, as they tell: see jest_trainer_step_seconds.",
            [job, "phase"],
            registry=registry,
        )
        self._perplexity = Gauge(
            "jest_job_sampling_perplexity",
            "Effective number of candidates, mean over the chunks of the last decision.",
            [job],
            registry=registry,
        )
        self._learnability = Gauge(
            "jest_job_learnability",
            "Learnability of a row's own pair in nats, mean of the rows that the last decision chose or dropped.",
            [job, "rows"],
            registry=registry,
        )
        self._ranks = Gauge("jest_job_ranks", "Ranks that train.", [job], registry=registry)

    @property
    def named(self) -> frozenset[str]:
        """The jobs that have series of their own."""
        return frozenset(self._seen_s)

    def is_idle(self, job: str) -> bool:
        """Whether nothing was heard of a job for so long that its place is better used by another."""
        return self._clock() - self._seen_s.get(job, 0.0) > JOB_IDLE_S

    def decided(
        self, decision: Decision, stages_s: Mapping[str, float], learnability: tuple[float, float] | None
    ) -> None:
        """Counts a decision; ``learnability`` is that of chosen and dropped rows, where they were chosen by it."""
        job = self._label(decision.job)
        self._decisions.labels(job, decision.fallback or "none").inc()
        self._loaded.labels(job).inc(decision.super_batch_size)
        self._selected.labels(job).inc(decision.sub_batch_size)
        self._hits.labels(job).inc(decision.cache_hits)
        self._inferences.labels(job).inc(decision.reference_inferences)
        for stage, seconds in stages_s.items():
            self._stages.labels(job, stage).inc(seconds)
        if job == OTHER_JOBS:
            return
        self._ranks.labels(job).set(len(decision.positions))
        if decision.perplexity:
            self._perplexity.labels(job).set(sum(decision.perplexity) / len(decision.perplexity))
        if learnability is not None:
            for rows, value in zip(("chosen", "dropped"), learnability, strict=True):
                self._learnability.labels(job, rows).set(value)

    def dead_lettered(self, job: str, reason: str) -> None:
        """Counts a super-batch that was set aside."""
        self._dead_letters.labels(self._label(job), reason).inc()

    def stepped(self, job: str, phases_s: Mapping[str, float]) -> None:
        """Counts where the time of one rank's step went."""
        label = self._label(job)
        for phase, seconds in phases_s.items():
            self._steps.labels(label, phase).inc(seconds)

    def forget(self, job: str) -> None:
        """Removes the series of a job that has ended."""
        if self._seen_s.pop(job, None) is None:
            return
        for metric in vars(self).values():
            if isinstance(metric, Counter | Gauge):
                metric.remove_by_labels({"jest_job": job})

    def _label(self, job: str) -> str:
        if job not in self._seen_s:
            if len(self._seen_s) >= self._limit:
                return OTHER_JOBS
            for fallback in _FALLBACKS:
                self._decisions.labels(job, fallback)
            for reason in _SELECTOR_REASONS:
                self._dead_letters.labels(job, reason)
        self._seen_s[job] = self._clock()
        return job


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
            "jest_selector_dead_letters", "Super-batches set aside.", ["reason"], registry=registry
        )
        self.stage = Histogram(
            "jest_selector_stage_duration_seconds",
            "Time of each stage of a selection.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        _start_at_zero(self.decisions, _FALLBACKS)
        _start_at_zero(self.dead_letters, _SELECTOR_REASONS)
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
        self.assemblies = Gauge(
            "jest_selector_assemblies", "Selections that wait for learner outputs or embeddings.", registry=registry
        )
        self.held_bytes = Gauge(
            "jest_selector_held_bytes", "Learner outputs held, in memory or in scratch files.", registry=registry
        )
        self.queue_depth = Gauge("jest_queue_shards", "Shards queued or being scored.", registry=registry)
        self.queue_age = Gauge(
            "jest_queue_oldest_age_seconds", "Age of the oldest shard queued or being scored.", registry=registry
        )

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
            "jest_scorer_dead_letters", "Super-batches set aside.", ["reason"], registry=registry
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
        _start_at_zero(self.shards, ("scored", "dead_lettered"))
        _start_at_zero(self.inference_examples, [outcome.value for outcome in Outcome])
        _start_at_zero(self.dead_letters, ("TOO_MANY_DELIVERIES", "INFERENCE_REFUSED", "INFERENCE_FAILED"))
        self.reclaimed = Counter(
            "jest_scorer_reclaimed_shards", "Shards taken over from a scorer that went silent.", registry=registry
        )
        self.reference_ready = Gauge(
            "jest_scorer_reference_ready", "1 while a real inference of the reference model works.", registry=registry
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
