"""The metrics that are told apart by job: bounded in number, and gone when the job is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jest_server.domain.decisions import Decision

FALLBACKS: Final = ("none", "uniform", "hard_learner")
SELECTOR_REASONS: Final = ("EXPIRED", "REFERENCE_CHANGED", "UNSELECTABLE")
OTHER_JOBS: Final = "_other"
"""No job can be called so: names start with a letter or a digit."""
JOB_IDLE_S: Final = 3600.0


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
            "jest_job_dead_letters",
            "Super-batches the selector dead-lettered.",
            [job, "reason"],
            registry=registry,
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
        """Count a dead-lettered super-batch."""
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
            for fallback in FALLBACKS:
                self._decisions.labels(job, fallback)
            for reason in SELECTOR_REASONS:
                self._dead_letters.labels(job, reason)
        self._seen_s[job] = self._clock()
        return job
