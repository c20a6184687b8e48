"""Which keys are there when, and how long they live."""

from __future__ import annotations

import time

import pytest
from redis.asyncio import Redis

from jest_server.domain.super_batches import SuperBatchRef
from jest_server.stores.redis import jobs
from jest_server.stores.redis.keys import Keys, queue_of
from jest_server.stores.redis.stores import open_redis_stores
from support.polling import wait_for
from support.super_batches import (
    REFERENCE,
    accounts,
    dead_letter,
    decision,
    key_prefix,
    queue_one,
    result_of,
    spec,
    submit,
    upload,
)

QUEUE = queue_of(REFERENCE.name, REFERENCE.version)


async def names(redis, keys):
    """Returns all keys under a prefix without it."""
    return {name.removeprefix(keys.prefix) for name in await redis.keys(f"{keys.prefix}*")}


async def test_all_keys_have_the_prefix_and_all_but_the_documented_expire(own_server, own_stores):
    stores, keys = own_stores, Keys()
    await queue_one(stores)
    (claim,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    await stores.queue.complete(claim, result_of(claim))
    await queue_one(stores, super_batch_id="open", shards=2)
    await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    for super_batch_id in ("decided", "dead"):
        await queue_one(stores, super_batch_id=super_batch_id)
    await stores.decisions.decide(decision("job", "decided"), keep_s=60)
    await stores.decisions.dead_letter(dead_letter("job", "dead"))
    await stores.jobs.announce_reference(REFERENCE, ttl_s=5)
    lasting = {
        *(
            keys.jobs,
            keys.weights,
            keys.in_flight,
            keys.usage,
            keys.queued,
            keys.model_queues,
            keys.events,
            keys.models,
        ),
        *(keys.counters("job"), keys.heartbeats(QUEUE), keys.waiting_jobs(QUEUE), keys.waiting(QUEUE, "job")),
    }
    expiring = {
        keys.super_batch(SuperBatchRef("job", "sb")),
        keys.super_batch(SuperBatchRef("job", "open")),
        keys.results(SuperBatchRef("job", "sb")),
        keys.features(SuperBatchRef("job", "open"), "0-u-000"),
        keys.features(SuperBatchRef("job", "open"), "0-u-001"),
        keys.decision(SuperBatchRef("job", "decided")),
        keys.decisions("job"),
        keys.dead_letters("job"),
        keys.dead_letter_order("job"),
        keys.reference("ref"),
        keys.wakeup(QUEUE),
        keys.kept_inputs(SuperBatchRef("job", "dead")),
        f"{keys.prefix}virtual_time:{QUEUE}",
    }
    async with Redis.from_url(f"{own_server.url}/0", decode_responses=True) as redis:
        held = set(await redis.keys("*"))
        assert {key for key in held if await redis.ttl(key) > 0} == expiring
    assert held == lasting | expiring


async def test_what_a_super_batch_holds_lives_as_long_as_it_may(stores, redis, keys):
    week_s = 7 * 86400
    await stores.jobs.create_job(spec("job"), now_s=1.0)
    await submit(stores, "job", ttl_s=week_s)
    await upload(stores, "job", shards=2)
    claim, _ = await stores.queue.claim("c", REFERENCE, count=2, block_s=1)
    await stores.queue.complete(claim, result_of(claim))
    for key in (
        keys.super_batch(SuperBatchRef("job", "sb")),
        keys.results(SuperBatchRef("job", "sb")),
        keys.features(SuperBatchRef("job", "sb"), "0-u-001"),
    ):
        assert await redis.ttl(key) > week_s


@pytest.mark.parametrize("how", ["decide", "dead_letter", "overdue"])
async def test_nothing_heavy_is_left_of_what_left_flight(stores, redis, keys, how):
    await queue_one(stores)
    (claim,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    await upload(stores, "job", shards=3, digest="v")
    await stores.queue.claim("c", REFERENCE, count=2, block_s=1)
    await stores.queue.complete(claim, result_of(claim))
    if how == "decide":
        await stores.decisions.decide(decision("job"), keep_s=60)
    elif how == "dead_letter":
        await stores.decisions.dead_letter(dead_letter("job"))
    else:
        await stores.decisions.dead_letter_overdue(now_s=time.time() + 1000)
    heavy = ("features", "results", "super_batch")
    assert [name for name in await names(redis, keys) if name.startswith(heavy)] == []
    assert await redis.zcard(keys.heartbeats(QUEUE)) == 0


async def test_a_deleted_job_leaves_no_key(stores, redis, keys, monkeypatch):
    monkeypatch.setattr(jobs, "DELETE_BATCH", 3)
    await queue_one(stores, job="other")
    await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    before = await names(redis, keys)
    for i in range(10):
        await queue_one(stores, super_batch_id=f"decided-{i}")
        await stores.decisions.decide(decision("job", f"decided-{i}"), keep_s=60)
    for i in range(4):
        await queue_one(stores, super_batch_id=f"open-{i}")
    for claim in await stores.queue.claim("c", REFERENCE, count=3, block_s=1):
        await stores.queue.complete(claim, result_of(claim))
    await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    await queue_one(stores, super_batch_id="dead")
    await stores.decisions.dead_letter(dead_letter("job", "dead"))
    assert await stores.jobs.delete_job("job")
    assert await names(redis, keys) - before <= {"events"}
    assert not await redis.zscore(f"{keys.prefix}idle_jobs:{QUEUE}", "job")
    assert await accounts(stores, "other") == (1, 0, 0, 1)


async def test_the_index_of_decisions_holds_only_those_that_are_kept(stores, redis, keys):
    await stores.jobs.create_job(spec("job"), now_s=1.0)
    for super_batch_id, keep_s in (("short", 0.05), ("long", 60)):
        await submit(stores, "job", super_batch_id)
        await stores.decisions.decide(decision("job", super_batch_id), keep_s=keep_s)

    async def gone():
        return await stores.decisions.get_decision(SuperBatchRef("job", "short")) is None

    await wait_for(gone)
    await submit(stores, "job", "next")
    await stores.decisions.decide(decision("job", "next"), keep_s=1)
    assert await redis.zrange(keys.decisions("job"), 0, -1) == ["next", "long"]
    assert await redis.ttl(keys.decisions("job")) > 50


async def test_servers_with_other_prefixes_share_a_redis_and_nothing_else(shared_server, stores):
    await queue_one(stores)
    other = open_redis_stores(f"{shared_server.url}/0", prefix=key_prefix())
    assert await other.jobs.get_job("job") is None
    assert await other.queue.claim("c", REFERENCE, count=1, block_s=0.01) == []
    assert await other.decisions.dead_letter_overdue(now_s=time.time() + 1000) == []
    await other.connection.close()


@pytest.mark.parametrize("prefix", ["", "jest:", "{}:", "{jest:"])
def test_a_prefix_without_a_hash_tag_is_refused(prefix):
    with pytest.raises(ValueError, match="hash tag"):
        open_redis_stores("redis://127.0.0.1:1/0", prefix=prefix)
