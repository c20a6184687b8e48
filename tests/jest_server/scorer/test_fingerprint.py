"""Weights replaced under the same version are refused by every scorer; the same weights are accepted again."""

from __future__ import annotations

import asyncio
import shutil
import uuid

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from jest_server.domain.super_batches import SuperBatchRef
from jest_server.local.triton_server import TritonServer
from jest_server.reference.triton import TritonReferenceModel, TritonSettings
from jest_server.runtime.metrics import ScorerMetrics
from jest_server.runtime.settings import ScorerSettings
from jest_server.scorer.worker import Worker
from support.polling import wait_for
from support.references import export_tiny_reference
from support.servers import triton_on


def make_worker(bench, **settings):
    counts = ScorerMetrics(CollectorRegistry())
    chosen = ScorerSettings(**{"consumer": uuid.uuid4().hex, "announce_interval_s": 0.1} | settings)
    ports = bench.stores.jobs, bench.stores.queue, bench.stores.decisions
    return Worker(*ports, bench.cache, bench.model, chosen, counts), counts


def mismatches(counts):
    return counts.fingerprint_mismatches._value.get()


@pytest.fixture
def other_weights(bench):
    """The model's weights after somebody replaced them, turned by a few degrees."""
    angle = 0.05
    turned = bench.model.weights.copy()
    turned[0, :2] = np.cos(angle), np.sin(angle)
    return turned


async def test_replaced_weights_are_refused_while_the_scorer_works(bench, other_weights):
    worker, counts = make_worker(bench)
    first = bench.model.weights
    await worker.watch_reference()
    await worker.check_fingerprint()
    assert (worker.ready, mismatches(counts)) == (True, 0)

    bench.model.weights = other_weights
    await worker.check_fingerprint()
    assert (worker.ready, mismatches(counts)) == (False, 1)
    await worker.watch_reference()
    assert (worker.ready, mismatches(counts)) == (False, 2)

    bench.model.weights = first
    await worker.watch_reference()
    assert (worker.ready, mismatches(counts)) == (True, 2)


async def test_a_refused_model_is_announced_no_more_and_its_shards_wait(bench, other_weights):
    async with bench.working(announce_interval_s=0.1) as worker:
        await bench.scored(await bench.queue(["a"]))
        first, bench.model.weights = bench.model.weights, other_weights
        await worker.check_fingerprint()
        waiting = await bench.queue(["b"])

        async def unannounced():
            known = await bench.stores.jobs.list_references()
            return all(not each.served for each in known if each.reference.version == bench.model.version)

        await wait_for(unannounced)
        assert await bench.stores.super_batches.get_results(SuperBatchRef(bench.job, waiting)) == []
        bench.model.weights = first
        await bench.scored(waiting)


async def test_all_scorers_compare_with_the_same_first_fingerprint(bench, other_weights):
    one, _ = make_worker(bench)
    await one.watch_reference()
    bench.model.weights = other_weights
    other, counts = make_worker(bench)
    await other.watch_reference()
    assert (other.ready, mismatches(counts)) == (False, 1)
    bench.model.version = uuid.uuid4().hex  # other weights under a version of their own
    await other.watch_reference()
    assert other.ready


async def test_the_tolerance_is_a_setting(bench, other_weights):
    await make_worker(bench)[0].watch_reference()
    bench.model.weights = other_weights
    tolerant, _ = make_worker(bench, fingerprint_min_cosine=0.99)
    await tolerant.watch_reference()
    assert tolerant.ready


async def test_a_fingerprint_that_cannot_be_taken_leaves_a_working_model_alone(bench):
    worker, counts = make_worker(bench)
    await worker.watch_reference()

    async def moved_on(reference):
        del reference
        return await bench.model.embed({"x": np.array([1])})

    bench.model.fingerprint = moved_on
    bench.model.is_ready = False
    await worker.check_fingerprint()
    assert (worker.ready, mismatches(counts)) == (True, 0)


async def test_a_real_triton_with_replaced_weights_is_refused_and_one_that_restarts_is_not(bench, tmp_path):
    problem = TritonServer.available()
    if problem:
        pytest.skip(problem)
    repository, other = tmp_path / "repository", tmp_path / "other"
    served = export_tiny_reference(repository)
    export_tiny_reference(other, seed=1)
    (tmp_path / "work").mkdir()
    with triton_on(repository, tmp_path / "work") as triton:
        bench.model = TritonReferenceModel(TritonSettings(triton.grpc_url))
        worker, counts = make_worker(bench)
        await wait_until_ready(worker)

        await asyncio.to_thread(triton.restart)
        worker._withdraw()
        await wait_until_ready(worker)
        await worker.check_fingerprint()
        assert (worker.ready, mismatches(counts)) == (True, 0)

        for weights in other.glob("**/weights.safetensors"):
            target = repository / weights.relative_to(other)
            shutil.copy(target, f"{target}.first")
            shutil.copy(weights, target)
        await asyncio.to_thread(triton.restart)
        await wait_for(bench.model.ready)
        assert (await bench.model.info()).version == served.version
        await worker.check_fingerprint()
        assert (worker.ready, mismatches(counts)) == (False, 1)

        for first in repository.glob("**/weights.safetensors.first"):
            shutil.move(first, first.with_suffix(""))
        await asyncio.to_thread(triton.restart)
        await wait_until_ready(worker)
        assert mismatches(counts) == 1
        await bench.model.close()


async def wait_until_ready(worker):
    async def ready():
        await worker.watch_reference()
        return worker.ready

    await wait_for(ready)
