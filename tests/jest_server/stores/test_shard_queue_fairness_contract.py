"""Which shard every ShardQueue hands out next: jobs by weight, inside a job by deadline."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from jest_server.domain.fair_queueing import StartTimeFairQueue
from support.super_batches import (
    REFERENCE,
    result_of,
    spec,
    submit,
    upload,
)


async def fill(stores, name, *, weight=1.0, shards, super_batch_id="sb", **fields):
    """Registers a job and lets so many of its shards wait."""
    await stores.jobs.create_job(spec(name, weight=weight), now_s=1.0)
    await submit(stores, name, super_batch_id, **fields)
    await upload(stores, name, super_batch_id, shards=shards)


async def jobs_of(stores, takes, reference=REFERENCE):
    """Takes shards one by one, as scorers do, and tells whose they were."""
    order = []
    for _ in range(takes):
        (claim,) = await stores.queue.claim("c", reference, count=1, block_s=0)
        await stores.queue.complete(claim, result_of(claim))
        order.append(claim.shard.job)
    return order


WEIGHTS = {"light": 0.5, "plain": 1.0, "heavy": 3.0, "odd": 1.7}


@pytest.mark.timeout(240)
async def test_shares_are_the_weights_over_ten_thousand_takes(stores):
    """The order is that of ``StartTimeFairQueue`` take by take, and the shares that come of it are the weights'."""
    total = sum(WEIGHTS.values())
    for name, weight in WEIGHTS.items():
        await stores.jobs.create_job(spec(name, weight=weight), now_s=1.0)
        need = int(10_000 * weight / total * 1.1)
        for first in range(0, need, 1000):
            await submit(stores, name, f"sb-{first}")
            await upload(stores, name, f"sb-{first}", shards=1000)
    taken = []
    while len(taken) < 10_000:
        taken += [c.shard.job for c in await stores.queue.claim("c", REFERENCE, count=500, block_s=0)]
    for name, weight in WEIGHTS.items():
        assert Counter(taken)[name] == pytest.approx(10_000 * weight / total, rel=0.05)
    turns = StartTimeFairQueue()
    for name in WEIGHTS:
        turns.join(name)
    for job in taken:
        assert job == turns.first()
        turns.take(job, cost=1 / WEIGHTS[job])


async def test_a_deep_queue_does_not_starve_a_job_with_one_shard(stores):
    await fill(stores, "deep", shards=50)
    await jobs_of(stores, 20)
    await fill(stores, "one", shards=1)
    assert "one" in await jobs_of(stores, 2)


async def test_a_job_that_was_idle_gets_no_credit_for_it(stores):
    await fill(stores, "busy", shards=30)
    await jobs_of(stores, 20)
    await fill(stores, "late", shards=6)
    order = await jobs_of(stores, 8)
    assert Counter(order) == {"busy": 4, "late": 4}


async def test_what_a_job_took_stays_charged_while_it_has_nothing(stores):
    await fill(stores, "a", weight=0.1, shards=1)
    await fill(stores, "b", shards=5)
    assert (await jobs_of(stores, 1)) == ["a"]
    await fill(stores, "a", shards=1, super_batch_id="next")
    assert (await jobs_of(stores, 6))[-1] == "a"


async def test_inside_a_job_the_earliest_deadline_is_first(stores):
    now_s = time.time()
    for super_batch_id, ttl_s in (("late", 300.0), ("soon", 100.0), ("middle", 200.0)):
        await fill(stores, "job", shards=2, super_batch_id=super_batch_id, ttl_s=ttl_s, now_s=now_s)
    claims = await stores.queue.claim("c", REFERENCE, count=9, block_s=0)
    assert [c.shard.super_batch_id for c in claims] == ["soon", "soon", "middle", "middle", "late", "late"]


async def test_a_released_shard_takes_its_place_by_deadline_again(stores):
    now_s = time.time()
    for super_batch_id, ttl_s in (("soon", 100.0), ("late", 200.0)):
        await fill(stores, "job", shards=1, super_batch_id=super_batch_id, ttl_s=ttl_s, now_s=now_s)
    claims = await stores.queue.claim("c", REFERENCE, count=1, block_s=0)
    await stores.queue.release("c", claims)
    (again,) = await stores.queue.claim("d", REFERENCE, count=1, block_s=0)
    assert again.shard.super_batch_id == "soon"


async def test_shards_that_are_removed_are_not_charged_to_their_job(stores):
    await fill(stores, "a", shards=5)
    await fill(stores, "b", shards=5)
    await stores.jobs.delete_job("a")
    assert await jobs_of(stores, 5) == ["b"] * 5
