"""A whole scorer on a Triton that answers anything: it survives, and scores when the model is right again."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import NamedTuple

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from jest_server.domain.super_batches import SuperBatchRef
from jest_server.reference.triton import TritonReferenceModel, TritonSettings
from jest_server.runtime.metrics import ScorerMetrics
from jest_server.runtime.settings import ScorerSettings
from jest_server.scorer.__main__ import serve
from support.fake_triton import fake_triton, good_answer, numbers_of
from support.malformed_answers import MALFORMED
from support.polling import wait_for


@pytest.fixture
async def fake():
    async with fake_triton() as fake:
        yield fake


class Running(NamedTuple):
    """A scorer's task and metrics."""

    task: asyncio.Task[None]
    counts: ScorerMetrics


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
        yield Running(running, counts)
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
    async with serving(bench, fake) as scorer:
        await bench.scored(await bench.queue(["before"], values=[[1]]))
        for number, (answer, _) in enumerate(MALFORMED.values()):
            fake.answer = answer
            waiting = await bench.queue([f"during-{number}"], values=[[number]])
            await answered(fake)
            assert await bench.stores.super_batches.get_results(SuperBatchRef(bench.job, waiting)) == []
            fake.answer = good_answer
            await bench.scored(waiting)
        assert not scorer.task.done()
    counters = await bench.stores.jobs.counters(bench.job)
    assert (counters.dead_lettered, counters.in_flight) == (0, 1 + len(MALFORMED))


async def test_a_scorer_survives_configurations_that_no_model_can_have(bench, fake):
    good = fake.config
    async with serving(bench, fake) as scorer:
        await bench.scored(await bench.queue(["before"], values=[[1]]))
        for config in (b"\xff\xff", b"", good.SerializeToString()[:-40]):
            fake.config = config
            await asyncio.sleep(0.3)
            assert not scorer.task.done()
        fake.config = good
        await bench.scored(await bench.queue(["after"], values=[[2]]))


def poisoned(value):
    """Answer as a model whose whole batch fails when 13 is in it."""

    def answer(request):
        response = good_answer(request)
        if 13 in numbers_of(request):
            rows = np.full(len(response.raw_output_contents[0]) // 4, value, "<f4")
            response.raw_output_contents[0] = rows.tobytes()
        return response

    return answer


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (np.nan, "has NaN or infinity in 1 of 1 rows"),
        (7e4, "has values beyond float16 in 1 of 1 rows"),
        (0, "has norms outside 0.01 to 1000 in 1 of 1 rows"),
    ],
)
async def test_one_bad_example_is_found_and_all_others_keep_their_embeddings(bench, fake, value, rule):
    keys = [f"{bench.job}-{i}" for i in range(16)]
    fake.answer = poisoned(value)
    async with serving(bench, fake) as scorer:
        letter = await bench.dead(await bench.queue(keys, values=[[i] for i in range(16)]))
        good = [key for key in keys if not key.endswith("-13")]
        result = await bench.scored(await bench.queue(good, values=[[i] for i in range(16) if i != 13]))
        assert result.inferred == 0
        info = await bench.model.info()
    assert letter.reason == "INFERENCE_FAILED"
    assert f"3 attempts: example '{bench.job}-13' (row 13): model ref: output image_embedding {rule}" in letter.detail
    assert scorer.counts.extra_passes._value.get() == 8
    values = await bench.cache.for_tenant_of(bench.job).get(info, keys)
    assert [key for key, found in zip(keys, values, strict=True) if found is None] == [f"{bench.job}-13"]
    assert np.isfinite(np.frombuffer(b"".join(found for found in values if found), np.float16)).all()
