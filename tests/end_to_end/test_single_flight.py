"""One reference scorer for many jobs: what Triton itself counts when jobs over the same data run at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from jest_bench.jobs import BenchJob, DataSet
from jest_bench.scoring_stack import ScoringStack
from jest_server.local.triton_server import TritonServer
from jest_server.reference.probe import PROBES
from support.polling import wait_until

pytestmark = pytest.mark.skipif(TritonServer.available() is not None, reason=str(TritonServer.available()))

EXAMPLES, ROWS, SHARD, SLOTS = 2048, 256, 128, 2


@pytest.fixture(scope="module")
def stack(stack_repository):
    settings = {"inference_lease_s": 2, "reclaim_idle_s": 2, "concurrent_shards": SLOTS}
    with ScoringStack(stack_repository, scorers=2, settings=settings) as stack:
        yield stack


@pytest.fixture
def jobs(stack, unique):
    jobs = [BenchJob(stack.address, unique(f"job-{number}"), rows=ROWS, at_a_time=4) for number in range(8)]
    yield jobs
    for job in jobs:
        job.close()


def train_at_once(jobs, data, keys, meanwhile=lambda: None):
    with ThreadPoolExecutor(len(jobs)) as pool:
        runs = [pool.submit(job.train, data, keys=keys) for job in jobs]
        meanwhile()
        return [run.result() for run in runs]


def test_eight_jobs_over_the_same_data_at_once_cost_one_inference_for_each_example(stack, jobs):
    data = DataSet.random(jobs[0].job.reference.inputs, EXAMPLES)
    before = stack.inferences()
    runs = train_at_once(jobs, data, "together")
    assert stack.inferences() - before == EXAMPLES
    assert sum(run.reference_inferences for run in runs) == EXAMPLES
    assert {run.cache_hits + run.reference_inferences for run in runs} == {EXAMPLES}


def test_a_scorer_that_is_killed_costs_no_more_than_what_it_had_in_hand(stack, jobs):
    data = DataSet.random(jobs[0].job.reference.inputs, EXAMPLES)
    before = stack.inferences()

    def kill_half_way():
        wait_until(lambda: stack.inferences() - before >= EXAMPLES / 4)
        stack.scorers[-1].kill()

    try:
        runs = train_at_once(jobs, data, "killed", kill_half_way)
    finally:
        stack.scorers[-1].start()
    assert {run.cache_hits + run.reference_inferences for run in runs} == {EXAMPLES}
    probes = 1 + PROBES  # of the scorer that was started again: the neutral example and its fingerprint's
    assert EXAMPLES <= stack.inferences() - before <= EXAMPLES + SLOTS * SHARD + probes
