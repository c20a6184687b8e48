"""A whole scorer on a Triton that answers anything: it survives, and scores when the model is right again."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from jest_server.domain.super_batches import SuperBatchRef
from jest_server.reference.triton import TritonReferenceModel, TritonSettings
from jest_server.runtime.metrics import ScorerMetrics
from jest_server.runtime.settings import ScorerSettings
from jest_server.scorer.__main__ import serve
from support.fake_triton import fake_triton, good_answer
from support.malformed_answers import MALFORMED
from support.polling import wait_for


@pytest.fixture
async def fake():
    async with fake_triton() as fake:
        yield fake


@asynccontextmanager
async def serving(bench, fake, **settings):
    """Run the scorer's own entry point on the fake Triton."""
    bench.model = TritonReferenceModel(TritonSettings(fake.url, model="ref", retries=0, timeout_s=5.0))
    defaults = {"consumer": bench.job, "announce_interval_s": 0.05, "listen": "127.0.0.1:0", "drain_delay_s": 0}
    stop, counts = asyncio.Event(), ScorerMetrics(CollectorRegistry())
    running = asyncio.create_task(
        serve(ScorerSettings(**defaults | settings), bench.stores, bench.cache, bench.model, counts, stop)
    )
    try:
        yield running
    finally:
        stop.set()
        await running


async def answered(fake, *, times=3):
    """Wait until the scorer has met the present answer."""
    before = fake.inferences

    async def often_enough():
        return fake.inferences >= before + times

    await wait_for(often_enough)


async def test_a_scorer_survives_every_malformed_answer_and_loses_no_shard(bench, fake):
    async with serving(bench, fake) as running:
        await bench.scored(await bench.queue(["before"], values=[[1]]))
        for number, (answer, _) in enumerate(MALFORMED.values()):
            fake.answer = answer
            waiting = await bench.queue([f"during-{number}"], values=[[number]])
            await answered(fake)
            assert await bench.stores.super_batches.get_results(SuperBatchRef(bench.job, waiting)) == []
            fake.answer = good_answer
            await bench.scored(waiting)
        assert not running.done()
    counters = await bench.stores.jobs.counters(bench.job)
    assert (counters.dead_lettered, counters.in_flight) == (0, 1 + len(MALFORMED))


async def test_a_scorer_survives_configurations_that_no_model_can_have(bench, fake):
    good = fake.config
    async with serving(bench, fake) as running:
        await bench.scored(await bench.queue(["before"], values=[[1]]))
        for config in (b"\xff\xff", b"", good.SerializeToString()[:-40]):
            fake.config = config
            await asyncio.sleep(0.3)
            assert not running.done()
        fake.config = good
        await bench.scored(await bench.queue(["after"], values=[[2]]))
