"""What only a real server can go through: dead and cancelled clients, a flushed, full, silent or restarted server."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
import uuid
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from jest_server.domain.errors import StoreUnavailable
from jest_server.domain.super_batches import SubmitStatus, SuperBatchRef, UploadStatus
from jest_server.stores.redis import connection, shard_queue
from jest_server.stores.redis import super_batches as redis_store_module
from jest_server.stores.redis.keys import queue_of
from jest_server.stores.redis.stores import open_redis_stores
from support.polling import wait_for, within
from support.servers import queue_server_of
from support.super_batches import (
    REFERENCE,
    accounts,
    dead_letter,
    decision,
    queue_one,
    result_of,
    spec,
    submit,
    upload,
)

QUEUE = queue_of(REFERENCE.name, REFERENCE.version)


@asynccontextmanager
async def configured(redis, name, value):
    """Runs the block with another server setting."""
    before = (await redis.config_get(name))[name]
    await redis.config_set(name, value)
    try:
        yield
    finally:
        await redis.config_set(name, before)


# Dead clients


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


async def test_what_a_killed_process_had_claimed_is_taken_over(shared_server, stores, keys):
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


async def test_features_of_an_uploader_that_died_before_queueing_go_soon(stores, redis, keys, monkeypatch):
    await stores.jobs.create_job(spec("job"), now_s=1.0)
    await submit(stores, "job")

    async def die(*_keys, **_):
        raise asyncio.CancelledError

    monkeypatch.setattr(stores.super_batches, "_add_upload", die)
    with pytest.raises(asyncio.CancelledError):
        await upload(stores, "job")
    assert 0 < await redis.ttl(keys.features(SuperBatchRef("job", "sb"), "0-u-000")) <= redis_store_module.UNQUEUED_S
    assert await stores.queue.depth() == 0


async def test_features_lost_before_queueing_are_told_and_nothing_is_queued(stores, redis, keys, monkeypatch):
    await stores.jobs.create_job(spec("job"), now_s=1.0)
    await submit(stores, "job")
    whole = stores.super_batches._add_upload

    async def lose_one(*call_keys, **call):
        await redis.delete(keys.features(SuperBatchRef("job", "sb"), "0-u-001"))
        return await whole(*call_keys, **call)

    monkeypatch.setattr(stores.super_batches, "_add_upload", lose_one)
    with pytest.raises(StoreUnavailable, match="lost the features"):
        await upload(stores, "job", shards=3)
    assert await stores.queue.depth() == 0
    monkeypatch.undo()
    assert await upload(stores, "job", shards=3) is UploadStatus.ACCEPTED


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


# Cancelled commands


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


async def test_answers_never_reach_another_caller_whatever_is_cancelled(stores):
    """The client library has mixed answers up before (redis-py#2624); here every answer tells whose it is."""
    dice = random.Random(5)
    jobs = [f"job-{i}" for i in range(20)]
    for job in jobs:
        await stores.jobs.create_job(spec(job), now_s=1.0)

    async def ask(job):
        if dice.random() < 0.5:
            return (await stores.jobs.get_job(job)).spec.name == job
        return (await stores.jobs.create_job(spec(job), now_s=2.0))[0].spec.name == job

    right = cancelled = 0
    for _ in range(80):
        calls = [asyncio.create_task(ask(dice.choice(jobs))) for _ in range(30)]
        for _ in range(dice.randrange(40)):
            await asyncio.sleep(0)
        for call in calls:
            if dice.random() < 0.5:
                call.cancel()
        for answer in await asyncio.gather(*calls, return_exceptions=True):
            cancelled += isinstance(answer, asyncio.CancelledError)
            right += answer is True
            assert answer is True or isinstance(answer, asyncio.CancelledError)
    assert right > 100
    assert cancelled > 100
    assert not stores.connection.client.connection_pool._in_use_connections


async def test_a_listener_ends_whenever_it_is_cancelled(stores):
    """Cancelled at each of the first steps after news came; one that is swallowed would leave the task for ever."""
    await stores.jobs.create_job(spec("job"), now_s=1.0)
    for steps in range(40):
        heard = asyncio.Event()

        async def listen(heard=heard):
            async for _ in stores.super_batches.events():
                heard.set()

        listener = asyncio.create_task(listen())

        async def make_news(steps=steps, heard=heard):
            name = f"sb-{steps}-{uuid.uuid4().hex}"
            await submit(stores, "job", name)
            await stores.decisions.dead_letter(dead_letter("job", name))
            return heard.is_set()

        await wait_for(make_news)
        for _ in range(steps):
            await asyncio.sleep(0)
        listener.cancel()
        await asyncio.wait([listener], timeout=30)
        assert listener.cancelled()


# Servers in trouble


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


async def test_a_server_that_is_away_is_told_soon_and_found_again(own_server, own_stores):
    await queue_one(own_stores)
    own_server.stop()
    for call in (
        own_stores.connection.ping(),
        own_stores.jobs.get_job("job"),
        own_stores.queue.claim("c", REFERENCE, count=1, block_s=0.1),
        submit(own_stores, "job", "other"),
        own_stores.queue.depth(),
    ):
        with within(connection.ANSWER_TIMEOUT_S), pytest.raises(StoreUnavailable, match="queue does not answer"):
            await call
    own_server.start()
    (claim,) = await own_stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    assert claim.shard.features == b"features"


async def test_a_silent_server_is_told_within_the_time_limit(own_server, own_stores, monkeypatch):
    monkeypatch.setattr(connection, "ANSWER_TIMEOUT_S", 0.3)
    await queue_one(own_stores)
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        for call in (
            own_stores.connection.ping(),
            own_stores.jobs.get_job("job"),
            own_stores.queue.claim("c", REFERENCE, count=1, block_s=0.1),
        ):
            started = time.monotonic()
            with within(1.5), pytest.raises(StoreUnavailable, match="nothing came within"):
                await call
            assert time.monotonic() - started > 0.25
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    assert (await own_stores.jobs.get_job("job")).spec.name == "job"


async def test_news_go_on_after_a_restart_that_forgot_everything(tmp_path):
    with queue_server_of("valkey", tmp_path) as server:
        stores = open_redis_stores(f"{server.url}/0")
        heard = set()

        async def listen():
            async for event in stores.super_batches.events():
                heard.add(event.ref.super_batch_id)

        listener = asyncio.create_task(listen())

        async def hears(prefix):
            name = f"{prefix}-{uuid.uuid4().hex}"
            await stores.jobs.create_job(spec("job"), now_s=1.0)
            await submit(stores, "job", name)
            await stores.decisions.dead_letter(dead_letter("job", name))
            return any(found.startswith(prefix) for found in heard)

        await wait_for(lambda: hears("before"))
        server.kill()
        server.start()
        await wait_for(lambda: hears("after"))
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)
        await stores.connection.close()


async def test_news_go_on_though_their_numbers_start_again(stores, redis, keys, monkeypatch):
    monkeypatch.setattr(redis_store_module, "EVENT_BLOCK_S", 0.05)
    await stores.jobs.create_job(spec("job"), now_s=1.0)
    await redis.xadd(keys.events, {"job": "job", "id": "future"}, id=f"{2 * round(time.time() * 1000)}-0")
    heard = asyncio.Event()

    async def listen():
        async for _ in stores.super_batches.events():
            heard.set()

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0.2)  # it has seen the high number
    await redis.delete(keys.events)
    await submit(stores, "job")
    await stores.decisions.dead_letter(dead_letter("job"))
    async with asyncio.timeout(30):
        await heard.wait()
    listener.cancel()
    await asyncio.gather(listener, return_exceptions=True)


async def test_acknowledged_writes_survive_a_killed_server(own_server, own_stores):
    await queue_one(own_stores)
    own_server.kill()
    own_server.start()
    assert await accounts(own_stores, "job") == (1, 0, 0, 1)
    assert len(await own_stores.queue.claim("c", REFERENCE, count=1, block_s=1)) == 1


async def test_a_full_server_takes_nothing_in_and_lets_everything_out(stores, redis):
    for super_batch_id in ("a", "b", "c"):
        await queue_one(stores, super_batch_id=super_batch_id)
    (claim,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    async with configured(redis, "maxmemory", "1"):
        for call in (submit(stores, "job", "d"), upload(stores, "job", "a", digest="v")):
            with pytest.raises(StoreUnavailable, match="OutOfMemoryError"):
                await call
        await stores.queue.heartbeat("c", [claim])
        assert await stores.queue.reclaim("d", REFERENCE, idle_s=60, count=1) == []
        (claim,) = await stores.queue.reclaim("d", REFERENCE, idle_s=0, count=1)
        await stores.queue.release("d", [claim])
        (claim,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
        await stores.queue.complete(claim, result_of(claim))
        assert await stores.super_batches.get_results(SuperBatchRef("job", "a")) == [result_of(claim)]
        await stores.decisions.decide(decision("job", "a"), keep_s=60)
        await stores.decisions.dead_letter(dead_letter("job", "b"))
        assert len(await stores.decisions.dead_letter_overdue(now_s=time.time() + 1000)) == 1
        assert await stores.jobs.delete_job("job")
    await stores.jobs.create_job(spec("job"), now_s=1.0)
    assert await submit(stores, "job", "d") is SubmitStatus.ACCEPTED


async def test_a_refused_command_is_not_quoted(stores, redis):
    await queue_one(stores)
    async with configured(redis, "maxmemory", "1"):
        with pytest.raises(StoreUnavailable) as caught:
            await upload(stores, "job", digest="v", features=b"private")
    assert "private" not in str(caught.value)
    assert "SET" not in str(caught.value)


async def test_a_server_that_cannot_replicate_is_unavailable(stores, redis):
    await queue_one(stores)
    async with configured(redis, "min-replicas-to-write", "1"):
        for call in (
            submit(stores, "job", "other"),
            upload(stores, "job", digest="v"),
            stores.jobs.delete_job("job"),
        ):
            with pytest.raises(StoreUnavailable, match="NOREPLICAS"):
                await call
    assert await accounts(stores, "job") == (1, 0, 0, 1)


async def test_a_demoted_server_is_unavailable_until_it_is_primary_again(own_server, own_stores):
    await own_stores.jobs.create_job(spec("job"), now_s=1.0)
    async with Redis.from_url(f"{own_server.url}/0") as redis:
        await redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(StoreUnavailable, match="ReadOnlyError"):
            await submit(own_stores, "job")
        await redis.execute_command("REPLICAOF", "NO", "ONE")
    assert await submit(own_stores, "job") is SubmitStatus.ACCEPTED


async def test_hundreds_of_callers_at_once_share_the_connections(stores):
    await stores.jobs.create_job(spec("job"), now_s=1.0)
    found = await asyncio.gather(*(stores.jobs.get_job("job") for _ in range(500)))
    assert {job.spec.name for job in found} == {"job"}
    assert len(stores.connection.client.connection_pool._available_connections) <= connection.MAX_CONNECTIONS


async def test_a_wait_longer_than_one_blocking_read_goes_on(stores, monkeypatch):
    monkeypatch.setattr(shard_queue, "BLOCK_S", 0.05)
    monkeypatch.setattr(connection, "ANSWER_TIMEOUT_S", 0.5)
    waiting = asyncio.create_task(stores.queue.claim("c", REFERENCE, count=1, block_s=10))
    await asyncio.sleep(0.7)
    await queue_one(stores)
    assert len(await waiting) == 1
