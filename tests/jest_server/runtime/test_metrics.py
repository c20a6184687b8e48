"""What is measured is bounded, described, and named as it should be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from jest_server.domain.storage import CacheStats, MemoryUse
from jest_server.runtime import metrics_page
from jest_server.runtime.job_metrics import JOB_IDLE_S, OTHER_JOBS, JobMetrics
from jest_server.runtime.metrics import LABELS, ScorerMetrics, SelectorMetrics
from support.super_batches import decision

DOCS = Path(__file__).parents[3] / "docs"
EVERY = [each for process in metrics_page.PROCESSES for each in metrics_page.measured(process)]
STAGES = {"compute": 0.5, "record": 0.25}


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


def jobs_of(registry):
    return set(re.findall(r'jest_job="([^"]+)"', generate_latest(registry).decode()))


def test_the_page_of_metrics_is_what_the_code_has():
    assert (DOCS / "metrics.md").read_text() == metrics_page.page(), "run: make documents"


@pytest.mark.parametrize("each", EVERY, ids=lambda each: each.name)
def test_every_metric_has_the_prefix_a_meaning_and_labels_that_are_described(each):
    assert re.fullmatch(r"jest_[a-z0-9_]+", each.name)
    assert each.meaning.endswith(".")
    assert set(each.labels) <= set(LABELS)
    assert not each.name.endswith(("_ms", "_milliseconds", "_kb", "_percent"))


def test_every_label_that_is_described_is_used():
    assert {label for each in EVERY for label in each.labels} == set(LABELS)


def test_no_more_jobs_than_allowed_have_series_and_the_others_are_added_up():
    registry = CollectorRegistry()
    jobs = JobMetrics(registry, limit=2)
    for number in range(1000):
        jobs.decided(decision(f"job-{number}"), STAGES, (2.0, 1.0))
        jobs.stepped(f"job-{number}", {"load": 1.0})
        jobs.dead_lettered(f"job-{number}", "EXPIRED")
    assert jobs_of(registry) == {"job-0", "job-1", OTHER_JOBS}
    loaded = registry.get_sample_value("jest_job_examples_loaded_total", {"jest_job": OTHER_JOBS})
    assert loaded == 998 * decision("x").super_batch_size
    waited = registry.get_sample_value("jest_job_trainer_seconds_total", {"jest_job": OTHER_JOBS, "phase": "load"})
    assert waited == 998.0
    assert registry.get_sample_value("jest_job_learnability", {"jest_job": OTHER_JOBS, "rows": "chosen"}) is None
    assert registry.get_sample_value("jest_job_learnability", {"jest_job": "job-1", "rows": "chosen"}) == 2.0


def test_the_number_of_series_stays_the_same_however_many_jobs_come_and_go():
    registry = CollectorRegistry()
    jobs = JobMetrics(registry, limit=3)
    sizes = set()
    for number in range(100):
        jobs.forget(f"job-{number - 3}")
        jobs.decided(decision(f"job-{number}"), STAGES, (2.0, 1.0))
        jobs.dead_lettered(f"job-{number}", "EXPIRED")
        if number >= 3:
            sizes.add(generate_latest(registry).count(b'jest_job="job-'))
    assert len(sizes) == 1


def test_a_job_that_ended_leaves_no_series_and_makes_room():
    registry = CollectorRegistry()
    jobs = JobMetrics(registry, limit=1)
    jobs.decided(decision("first"), STAGES, (2.0, 1.0))
    jobs.stepped("first", {"train": 1.0})
    jobs.forget("first")
    assert jobs_of(registry) == set()
    assert jobs.named == set()
    jobs.decided(decision("second"), STAGES, None)
    assert jobs_of(registry) == {"second"}
    jobs.forget("never seen")
    assert jobs_of(registry) == {"second"}


def test_without_room_for_any_job_there_is_only_the_sum():
    registry = CollectorRegistry()
    jobs = JobMetrics(registry, limit=0)
    jobs.decided(decision("first"), STAGES, (2.0, 1.0))
    assert jobs_of(registry) == {OTHER_JOBS}


def test_a_job_that_nothing_is_heard_of_for_an_hour_is_idle():
    clock = Clock()
    jobs = JobMetrics(CollectorRegistry(), limit=2, clock=clock)
    jobs.decided(decision("first"), STAGES, None)
    clock.now_s += JOB_IDLE_S
    assert not jobs.is_idle("first")
    clock.now_s += 1
    assert jobs.is_idle("first")
    jobs.stepped("first", {"train": 1.0})
    assert not jobs.is_idle("first")


def test_memory_is_told_of_both_stores():
    registry = CollectorRegistry()
    cache = CacheStats(values=1, used_bytes=30, max_bytes=40, hits=0, misses=0, evicted=5)
    SelectorMetrics(registry).observe_memory(MemoryUse(used_bytes=10, max_bytes=0), cache)
    values = {
        (name, store): registry.get_sample_value(f"jest_redis_{name}", {"store": store})
        for name in ("memory_bytes", "max_memory_bytes")
        for store in ("queue", "cache")
    }
    assert list(values.values()) == [10, 30, 0, 40]
    assert registry.get_sample_value("jest_redis_evicted_values") == 5


def test_what_alerts_watch_is_there_before_it_first_happens():
    """Prometheus sees no rise in a series that begins with its first event."""
    registry = CollectorRegistry()
    SelectorMetrics(registry)
    scorer = CollectorRegistry()
    ScorerMetrics(scorer)
    assert scorer.get_sample_value("jest_scorer_dead_letters_total", {"reason": "INFERENCE_FAILED"}) == 0
    for name, labels in (
        ("jest_selector_decisions_total", {"fallback": "uniform"}),
        ("jest_selector_dead_letters_total", {"reason": "EXPIRED"}),
    ):
        assert registry.get_sample_value(name, labels) == 0
