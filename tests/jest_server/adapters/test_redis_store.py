"""What only a real server can go through: killed clients, a flushed or restarted server, keys and their lifetimes."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid

import pytest
from redis.asyncio import Redis

from jest_server.adapters import redis_keys
from jest_server.adapters.redis_store import RedisSuperBatchStore
from jest_server.errors import StoreUnavailable
from jest_server.model import JobSpec, PolicySpec, ReferenceInfo, Shard, ShardResult, Submission
from support.servers import queue_kinds, queue_server_of

REFERENCE = ReferenceInfo(
    name="ref", version="1", preprocessing_id="p", scale=1.0, bias=0.0, embedding_width=2, inputs=()
)


@pytest.fixture(params=queue_kinds())
def server(request, tmp_path):
    with queue_server_of(request.param, tmp_path, append_only=True) as server:
        yield server


@pytest.fixture
async def store(server):
    store = RedisSuperBatchStore.from_url(f"{server.url}/0")
    yield store
    await store.close()


async def queue_one(store, job="job", super_batch_id="sb"):
    await store.create_job(
        JobSpec(name=job, reference_model="ref", policy=PolicySpec(sub_batch_size=16)), now_s=time.time()
    )
    submission = Submission(
        job=job,
        super_batch_id=super_batch_id,
        rank=0,
        world_size=1,
        reference=REFERENCE,
        keys=("a",),
        digest="d",
    )
    await store.submit(submission, max_in_flight=10, ttl_s=60, now_s=time.time())
    shard = Shard("0-u-0", job, super_batch_id, "ref", "1", ("a",), b"features")
    await store.add_upload(job, super_batch_id, 0, digest="u", positions=(0,), shards=[shard])


CLAIM_AND_HANG = """
import asyncio, sys
from jest_server.adapters.redis_store import RedisSuperBatchStore

async def main():
    store = RedisSuperBatchStore.from_url(sys.argv[1])
    assert len(await store.claim("victim", count=1, block_s=5)) == 1
    sys.stdout.write("claimed\\n")
    sys.stdout.flush()
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_what_a_killed_process_had_claimed_is_taken_over(server, store):
    await queue_one(store)
    victim = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLAIM_AND_HANG, f"{server.url}/0", stdout=asyncio.subprocess.PIPE
    )
    assert await asyncio.wait_for(victim.stdout.readline(), 20) == b"claimed\n"
    victim.kill()
    await victim.communicate()
    await asyncio.sleep(0.2)
    (claim,) = await store.reclaim("heir", idle_s=0.1, count=1)
    assert claim.deliveries == 2
    await store.complete(claim, ShardResult(("a",), b"\0" * 8, 1))
    assert len(await store.get_results("job", "sb")) == 1


async def test_a_flushed_server_serves_on(server, store):
    await queue_one(store)
    await store.claim("c", count=1, block_s=1)
    async with Redis.from_url(f"{server.url}/0") as redis:
        await redis.flushall()
    assert await store.reclaim("c", idle_s=0, count=1) == []
    await queue_one(store, super_batch_id="after")
    (claim,) = await store.claim("c", count=1, block_s=1)
    assert claim.shard.super_batch_id == "after"


async def test_a_server_that_is_away_is_told_soon_and_found_again(server, store):
    await queue_one(store)
    server.stop()
    started = time.monotonic()
    for call in (store.ping(), store.get_job("job"), store.claim("c", count=1, block_s=0.1), store.queue_depth()):
        with pytest.raises(StoreUnavailable, match="queue does not answer"):
            await call
    assert time.monotonic() - started < 20
    server.start()
    (claim,) = await store.claim("c", count=1, block_s=1)
    assert claim.shard.features == b"features"


async def test_acknowledged_writes_survive_a_killed_server(server, store):
    await queue_one(store)
    server.kill()
    server.start()
    assert (await store.counters("job")).in_flight == 1
    assert len(await store.claim("c", count=1, block_s=1)) == 1


async def test_a_cancelled_blocking_read_spoils_nothing(store):
    for _ in range(5):
        reading = asyncio.create_task(store.claim("c", count=1, block_s=5))
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    await queue_one(store)
    claims = await store.claim("c", count=1, block_s=1) or await store.reclaim("c", idle_s=0, count=1)
    assert claims[0].shard.super_batch_id == "sb"
    assert (await store.get_job("job")).spec.name == "job"


async def test_every_key_has_the_prefix_and_all_but_the_documented_expire(server, store):
    await queue_one(store)
    (claim,) = await store.claim("c", count=1, block_s=1)
    await store.complete(claim, ShardResult(("a",), b"\0" * 8, 1))
    await queue_one(store, super_batch_id="open")
    await store.announce_reference(REFERENCE, ttl_s=5)
    lasting = {redis_keys.JOBS, redis_keys.IN_FLIGHT, redis_keys.SHARDS, redis_keys.NEWS, redis_keys.counters("job")}
    async with Redis.from_url(f"{server.url}/0", decode_responses=True) as redis:
        keys = set(await redis.keys("*"))
        assert all(key.startswith(redis_keys.PREFIX) for key in keys)
        expiring = {key for key in keys if await redis.ttl(key) > 0}
    assert keys - expiring == lasting
    assert {redis_keys.results("job", "sb"), redis_keys.features("job", "open", "0-u-0")} <= expiring


async def test_a_url_with_a_password_is_not_in_any_message(server):
    secret = uuid.uuid4().hex
    store = RedisSuperBatchStore.from_url(f"redis://:{secret}@127.0.0.1:1/0")
    with pytest.raises(StoreUnavailable) as caught:
        await store.ping()
    assert secret not in str(caught.value)
    assert secret not in repr(store.__dict__)
    await store.close()
