"""Shards on a real server: killed and cancelled consumers, a flushed server, long waits."""

from __future__ import annotations

import asyncio
import sys

import pytest
from redis.asyncio import Redis

from jest_server.domain.super_batches import SuperBatchRef
from jest_server.stores.redis import connection, shard_queue
from jest_server.stores.redis.keys import queue_of
from support.polling import wait_for
from support.super_batches import (
    REFERENCE,
    queue_one,
    result_of,
)

QUEUE = queue_of(REFERENCE.name, REFERENCE.version)


CLAIM_AND_HANG = """
import asyncio, sys
from jest_server.stores.redis.stores import open_redis_stores
from jest_server.domain.references import ReferenceInfo

async def main():
    stores = open_redis_stores(sys.argv[1], prefix=sys.argv[2])
    reference = ReferenceInfo.model_validate_json(sys.argv[3])
    assert len(await stores.queue.claim("victim", reference, count=1, block_s=5)) == 1
    sys.stdout.write("claimed\\n")
    sys.stdout.flush()
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_what_a_killed_process_had_claimed_is_reclaimed(shared_server, stores, keys):
    await queue_one(stores)
    victim = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CLAIM_AND_HANG, f"{shared_server.url}/0", keys.prefix, REFERENCE.model_dump_json()),
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(20):
        while await victim.stdout.readline() != b"claimed\n":
            pass  # log lines
    victim.kill()
    await victim.communicate()
    (claim,) = await wait_for(lambda: stores.queue.reclaim("heir", REFERENCE, idle_s=0.1, count=1))
    assert claim.deliveries == 2
    await stores.queue.complete(claim, result_of(claim))
    assert await stores.super_batches.get_results(SuperBatchRef("job", "sb")) == [result_of(claim)]


async def test_nothing_is_remembered_of_a_consumer_that_holds_nothing(stores, redis, keys):
    await queue_one(stores)
    super_batch = keys.super_batch(SuperBatchRef("job", "sb"))
    await stores.queue.claim("holds", REFERENCE, count=1, block_s=1)
    await stores.queue.claim("gone", REFERENCE, count=1, block_s=0.01)
    assert await redis.hget(super_batch, "claimed_by:0-u-000") == "holds"
    assert await redis.zrange(keys.heartbeats(QUEUE), 0, -1) == ["job/sb/0-u-000"]
    (claim,) = await stores.queue.reclaim("alive", REFERENCE, idle_s=0, count=1)
    assert claim.deliveries == 2
    assert await redis.hget(super_batch, "claimed_by:0-u-000") == "alive"
    await stores.queue.release("alive", [claim])
    assert not await redis.hexists(super_batch, "claimed_by:0-u-000")
    assert not await redis.exists(keys.heartbeats(QUEUE))


async def test_a_release_brings_nothing_back_of_what_ran_out(stores, redis, keys):
    await queue_one(stores)
    claims = await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    await redis.delete(keys.super_batch(SuperBatchRef("job", "sb")))  # as its backstop would
    await stores.queue.release("c", claims)
    assert await stores.queue.depth() == 0
    assert not await redis.exists(keys.super_batch(SuperBatchRef("job", "sb")))


async def test_a_cancelled_blocking_read_spoils_nothing(stores):
    for _ in range(5):
        reading = asyncio.create_task(stores.queue.claim("c", REFERENCE, count=1, block_s=5))
        await asyncio.sleep(0.02)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    await queue_one(stores)
    claims = await stores.queue.claim("c", REFERENCE, count=1, block_s=1) or await stores.queue.reclaim(
        "c", REFERENCE, idle_s=0, count=1
    )
    assert claims[0].shard.super_batch_id == "sb"
    assert (await stores.jobs.get_job("job")).spec.name == "job"


async def test_a_wait_longer_than_one_blocking_read_goes_on(stores, monkeypatch):
    monkeypatch.setattr(shard_queue, "BLOCK_S", 0.05)
    monkeypatch.setattr(connection, "ANSWER_TIMEOUT_S", 0.5)
    waiting = asyncio.create_task(stores.queue.claim("c", REFERENCE, count=1, block_s=10))
    await asyncio.sleep(0.7)
    await queue_one(stores)
    assert len(await waiting) == 1


async def test_a_flushed_server_serves_on(own_server, own_stores):
    await queue_one(own_stores)
    (claim,) = claims = await own_stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    async with Redis.from_url(f"{own_server.url}/0") as redis:
        await redis.flushall()
    assert await own_stores.queue.reclaim("c", REFERENCE, idle_s=0, count=1) == []
    await own_stores.queue.heartbeat("c", claims)
    await own_stores.queue.release("c", claims)
    await own_stores.queue.complete(claim, result_of(claim))
    await queue_one(own_stores, super_batch_id="after")
    await own_stores.queue.heartbeat("c", claims)
    await own_stores.queue.release("c", claims)
    assert await own_stores.queue.reclaim("c", REFERENCE, idle_s=0, count=1) == []
    (claim,) = await own_stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    assert claim.shard.super_batch_id == "after"
