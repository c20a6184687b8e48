"""What only a real server can go through: dead clients, a flushed, full or silent server, keys and their lifetimes."""

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

from jest_server.adapters import redis_connection, redis_queue, redis_store
from jest_server.adapters.redis_keys import GROUP, Keys
from jest_server.adapters.redis_store import RedisSuperBatchStore
from jest_server.errors import StoreUnavailable
from jest_server.model import SubmitStatus, UploadStatus
from support.servers import queue_kinds, queue_server_of
from support.super_batches import (
    REFERENCE,
    accounts,
    decision,
    key_prefix,
    letter,
    queue_one,
    result_of,
    shard,
    spec,
    submit,
    upload,
)


@pytest.fixture(scope="module", params=queue_kinds())
def shared_server(request, tmp_path_factory):
    """A server for tests that leave it as it was."""
    with queue_server_of(request.param, tmp_path_factory.mktemp("shared")) as server:
        yield server


@pytest.fixture
def keys():
    return Keys(key_prefix())


@pytest.fixture
async def store(shared_server, keys):
    store = RedisSuperBatchStore.from_url(f"{shared_server.url}/0", prefix=keys.prefix)
    yield store
    await store.close()


@pytest.fixture
async def redis(shared_server):
    async with Redis.from_url(f"{shared_server.url}/0", decode_responses=True) as redis:
        yield redis


@pytest.fixture(params=queue_kinds())
def server(request, tmp_path):
    """A server of the test's own, to break."""
    with queue_server_of(request.param, tmp_path, append_only=True) as server:
        yield server


@pytest.fixture
async def own_store(server):
    store = RedisSuperBatchStore.from_url(f"{server.url}/0")
    yield store
    await store.close()


async def wait_for(condition, timeout_s=10.0):
    """Polls an async condition until it holds, and returns what it gave."""
    async with asyncio.timeout(timeout_s):
        while not (found := await condition()):
            await asyncio.sleep(0.01)
    return found


async def names(redis, keys):
    """Returns all keys under a prefix without it."""
    return {name.removeprefix(keys.prefix) for name in await redis.keys(f"{keys.prefix}*")}


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
from jest_server.adapters.redis_store import RedisSuperBatchStore

async def main():
    store = RedisSuperBatchStore.from_url(sys.argv[1], prefix=sys.argv[2])
    assert len(await store.claim("victim", count=1, block_s=5)) == 1
    sys.stdout.write("claimed\\n")
    sys.stdout.flush()
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_what_a_killed_process_had_claimed_is_taken_over(shared_server, store, keys):
    await queue_one(store)
    victim = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLAIM_AND_HANG, f"{shared_server.url}/0", keys.prefix, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(20):
        while await victim.stdout.readline() != b"claimed\n":
            pass  # log lines
    victim.kill()
    await victim.communicate()
    (claim,) = await wait_for(lambda: store.reclaim("heir", idle_s=0.1, count=1))
    assert claim.deliveries == 2
    await store.complete(claim, result_of(claim))
    assert await store.get_results("job", "sb") == [result_of(claim)]


async def test_features_of_an_uploader_that_died_before_queueing_go_soon(store, redis, keys, monkeypatch):
    await store.create_job(spec("job"), now_s=1.0)
    await submit(store, "job")

    async def die(**_):
        raise asyncio.CancelledError

    monkeypatch.setattr(store, "_add_upload", die)
    with pytest.raises(asyncio.CancelledError):
        await upload(store, "job")
    assert 0 < await redis.ttl(keys.features("job", "sb", "0-u-0")) <= redis_store.UNQUEUED_S
    assert await store.queue_depth() == 0


async def test_features_lost_before_queueing_are_told_and_nothing_is_queued(store, redis, keys, monkeypatch):
    await store.create_job(spec("job"), now_s=1.0)
    await submit(store, "job")
    whole = store._add_upload

    async def lose_one(**call):
        await redis.delete(keys.features("job", "sb", "0-u-1"))
        return await whole(**call)

    monkeypatch.setattr(store, "_add_upload", lose_one)
    with pytest.raises(StoreUnavailable, match="lost the features"):
        await upload(store, "job", shards=3)
    assert await store.queue_depth() == 0
    monkeypatch.undo()
    assert await upload(store, "job", shards=3) is UploadStatus.ACCEPTED


async def test_a_consumer_that_is_long_gone_is_forgotten_unless_it_holds_something(store, redis, keys, monkeypatch):
    monkeypatch.setattr(redis_queue, "CONSUMER_FORGOTTEN_S", 0.02)
    await queue_one(store)
    await store.claim("holds", count=1, block_s=1)
    await store.claim("gone", count=1, block_s=0.01)

    async def remaining():
        await store.reclaim("alive", idle_s=60, count=1)
        consumers = await redis.xinfo_consumers(keys.shards, GROUP)
        return {consumer["name"] for consumer in consumers} <= {"holds", "alive"}

    await wait_for(remaining)
    (claim,) = await store.reclaim("alive", idle_s=0, count=1)
    assert claim.deliveries == 2


# Cancelled commands


async def test_a_cancelled_blocking_read_spoils_nothing(store):
    for _ in range(5):
        reading = asyncio.create_task(store.claim("c", count=1, block_s=5))
        await asyncio.sleep(0.02)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    await queue_one(store)
    claims = await store.claim("c", count=1, block_s=1) or await store.reclaim("c", idle_s=0, count=1)
    assert claims[0].shard.super_batch_id == "sb"
    assert (await store.get_job("job")).spec.name == "job"


async def test_answers_never_reach_another_caller_whatever_is_cancelled(store):
    """The client library has mixed answers up before (redis-py#2624); here every answer tells whose it is."""
    dice = random.Random(5)
    jobs = [f"job-{i}" for i in range(20)]
    for job in jobs:
        await store.create_job(spec(job), now_s=1.0)

    async def ask(job):
        if dice.random() < 0.5:
            return (await store.get_job(job)).spec.name == job
        return (await store.create_job(spec(job), now_s=2.0))[0].spec.name == job

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
    assert not store._client.connection_pool._in_use_connections


async def test_a_listener_ends_whenever_it_is_cancelled(store):
    """Cancelled at each of the first steps after news came; one that is swallowed would leave the task for ever."""
    await store.create_job(spec("job"), now_s=1.0)
    for steps in range(40):
        heard = asyncio.Event()

        async def listen(heard=heard):
            async for _ in store.news():
                heard.set()

        listener = asyncio.create_task(listen())

        async def make_news(steps=steps, heard=heard):
            name = f"sb-{steps}-{uuid.uuid4().hex}"
            await submit(store, "job", name)
            await store.dead_letter(letter("job", name))
            return heard.is_set()

        await wait_for(make_news)
        for _ in range(steps):
            await asyncio.sleep(0)
        listener.cancel()
        await asyncio.wait([listener], timeout=1)
        assert listener.cancelled()


# Servers in trouble


async def test_a_flushed_server_serves_on(server, own_store):
    await queue_one(own_store)
    (claim,) = claims = await own_store.claim("c", count=1, block_s=1)
    async with Redis.from_url(f"{server.url}/0") as redis:
        await redis.flushall()
    assert await own_store.reclaim("c", idle_s=0, count=1) == []
    await own_store.keep("c", claims)
    await own_store.release("c", claims)
    await own_store.complete(claim, result_of(claim))
    await queue_one(own_store, super_batch_id="after")
    await own_store.keep("c", claims)  # now there is a stream, and no group
    await own_store.release("c", claims)
    assert await own_store.reclaim("c", idle_s=0, count=1) == []
    (claim,) = await own_store.claim("c", count=1, block_s=1)
    assert claim.shard.super_batch_id == "after"


async def test_a_server_that_is_away_is_told_soon_and_found_again(server, own_store):
    await queue_one(own_store)
    server.stop()
    for call in (
        own_store.ping(),
        own_store.get_job("job"),
        own_store.claim("c", count=1, block_s=0.1),
        submit(own_store, "job", "other"),
        own_store.queue_depth(),
    ):
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="queue does not answer"):
            await call
        assert time.monotonic() - started < redis_connection.ANSWER_TIMEOUT_S
    server.start()
    (claim,) = await own_store.claim("c", count=1, block_s=1)
    assert claim.shard.features == b"features"


async def test_a_silent_server_is_told_within_the_time_limit(server, own_store, monkeypatch):
    monkeypatch.setattr(redis_connection, "ANSWER_TIMEOUT_S", 0.3)
    await queue_one(own_store)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        for call in (own_store.ping(), own_store.get_job("job"), own_store.claim("c", count=1, block_s=0.1)):
            started = time.monotonic()
            with pytest.raises(StoreUnavailable, match="nothing came within"):
                await call
            assert 0.25 < time.monotonic() - started < 1.5
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert (await own_store.get_job("job")).spec.name == "job"


async def test_news_go_on_after_a_restart_that_forgot_everything(tmp_path):
    with queue_server_of(queue_kinds()[0], tmp_path) as server:
        store = RedisSuperBatchStore.from_url(f"{server.url}/0")
        heard = set()

        async def listen():
            async for news in store.news():
                heard.add(news.super_batch_id)

        listener = asyncio.create_task(listen())

        async def hears(prefix):
            name = f"{prefix}-{uuid.uuid4().hex}"
            await store.create_job(spec("job"), now_s=1.0)
            await submit(store, "job", name)
            await store.dead_letter(letter("job", name))
            return any(found.startswith(prefix) for found in heard)

        await wait_for(lambda: hears("before"))
        server.kill()
        server.start()
        await wait_for(lambda: hears("after"))
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)
        await store.close()


async def test_acknowledged_writes_survive_a_killed_server(server, own_store):
    await queue_one(own_store)
    server.kill()
    server.start()
    assert await accounts(own_store, "job") == (1, 0, 0, 1)
    assert len(await own_store.claim("c", count=1, block_s=1)) == 1


async def test_a_full_server_takes_nothing_in_and_lets_everything_out(store, redis):
    for super_batch_id in ("a", "b", "c"):
        await queue_one(store, super_batch_id=super_batch_id)
    (claim,) = await store.claim("c", count=1, block_s=1)
    async with configured(redis, "maxmemory", "1"):
        for call in (submit(store, "job", "d"), upload(store, "job", "a", digest="v")):
            with pytest.raises(StoreUnavailable, match="OutOfMemoryError"):
                await call
        await store.complete(claim, result_of(claim))
        assert await store.get_results("job", "a") == [result_of(claim)]
        await store.decide(decision("job", "a"), keep_s=60)
        await store.dead_letter(letter("job", "b"))
        assert len(await store.dead_letter_overdue(now_s=time.time() + 1000)) == 1
        assert await store.delete_job("job")
    await store.create_job(spec("job"), now_s=1.0)
    assert await submit(store, "job", "d") is SubmitStatus.ACCEPTED


async def test_a_refused_command_is_not_quoted(store, redis):
    await queue_one(store)
    async with configured(redis, "maxmemory", "1"):
        with pytest.raises(StoreUnavailable) as caught:
            await upload(store, "job", digest="v", features=b"private")
    assert "private" not in str(caught.value)
    assert "SET" not in str(caught.value)


async def test_a_server_that_cannot_replicate_is_unavailable(store, redis):
    await queue_one(store)
    async with configured(redis, "min-replicas-to-write", "1"):
        for call in (submit(store, "job", "other"), upload(store, "job", digest="v"), store.delete_job("job")):
            with pytest.raises(StoreUnavailable, match="NOREPLICAS"):
                await call
    assert await accounts(store, "job") == (1, 0, 0, 1)


async def test_a_demoted_server_is_unavailable_until_it_is_primary_again(server, own_store):
    await own_store.create_job(spec("job"), now_s=1.0)
    async with Redis.from_url(f"{server.url}/0") as redis:
        await redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(StoreUnavailable, match="ReadOnlyError"):
            await submit(own_store, "job")
        await redis.execute_command("REPLICAOF", "NO", "ONE")
    assert await submit(own_store, "job") is SubmitStatus.ACCEPTED


async def test_hundreds_of_callers_at_once_share_the_connections(store):
    await store.create_job(spec("job"), now_s=1.0)
    found = await asyncio.gather(*(store.get_job("job") for _ in range(500)))
    assert {job.spec.name for job in found} == {"job"}
    assert len(store._client.connection_pool._available_connections) <= redis_connection.MAX_CONNECTIONS


async def test_a_wait_longer_than_one_blocking_read_goes_on(store, monkeypatch):
    monkeypatch.setattr(redis_queue, "BLOCK_S", 0.05)
    monkeypatch.setattr(redis_connection, "ANSWER_TIMEOUT_S", 0.5)
    waiting = asyncio.create_task(store.claim("c", count=1, block_s=10))
    await asyncio.sleep(0.7)
    await queue_one(store)
    assert len(await waiting) == 1


# Keys


async def test_all_keys_have_the_prefix_and_all_but_the_documented_expire(server, own_store):
    store, keys = own_store, Keys()
    await queue_one(store)
    (claim,) = await store.claim("c", count=1, block_s=1)
    await store.complete(claim, result_of(claim))
    await queue_one(store, super_batch_id="open")
    for super_batch_id in ("decided", "dead"):
        await queue_one(store, super_batch_id=super_batch_id)
    await store.decide(decision("job", "decided"), keep_s=60)
    await store.dead_letter(letter("job", "dead"))
    await store.announce_reference(REFERENCE, ttl_s=5)
    lasting = {keys.jobs, keys.in_flight, keys.shards, keys.news, keys.counters("job")}
    expiring = {
        keys.super_batch("job", "sb"),
        keys.super_batch("job", "open"),
        keys.results("job", "sb"),
        keys.features("job", "open", "0-u-0"),
        keys.decision("job", "decided"),
        keys.decided("job"),
        keys.dead("job"),
        keys.dead_order("job"),
        keys.reference("ref"),
    }
    async with Redis.from_url(f"{server.url}/0", decode_responses=True) as redis:
        held = set(await redis.keys("*"))
        assert {key for key in held if await redis.ttl(key) > 0} == expiring
    assert held == lasting | expiring


async def test_what_a_super_batch_holds_lives_as_long_as_it_may(store, redis, keys):
    week_s = 7 * 86400
    await store.create_job(spec("job"), now_s=1.0)
    await submit(store, "job", ttl_s=week_s)
    await upload(store, "job", shards=2)
    claim, _ = await store.claim("c", count=2, block_s=1)
    await store.complete(claim, result_of(claim))
    for key in (keys.super_batch("job", "sb"), keys.results("job", "sb"), keys.features("job", "sb", "0-u-1")):
        assert await redis.ttl(key) > week_s


@pytest.mark.parametrize("how", ["decide", "dead_letter", "overdue"])
async def test_nothing_heavy_is_left_of_what_left_flight(store, redis, keys, how):
    await queue_one(store)
    (claim,) = await store.claim("c", count=1, block_s=1)
    await upload(store, "job", shards=3, digest="v")
    await store.claim("c", count=2, block_s=1)
    await store.complete(claim, result_of(claim))
    if how == "decide":
        await store.decide(decision("job"), keep_s=60)
    elif how == "dead_letter":
        await store.dead_letter(letter("job"))
    else:
        await store.dead_letter_overdue(now_s=time.time() + 1000)
    heavy = ("features", "results", "super_batch")
    assert [name for name in await names(redis, keys) if name.startswith(heavy)] == []
    assert (await redis.xpending(keys.shards, GROUP))["pending"] == 0


async def test_a_repeated_upload_leaves_no_features_behind(store, redis, keys, monkeypatch):
    await queue_one(store)
    (claim,) = await store.claim("c", count=1, block_s=1)
    await store.complete(claim, result_of(claim))

    async def not_yet(*_):
        return False

    monkeypatch.setattr(store._client, "hexists", not_yet)  # the repeat began before the first upload was queued
    assert await upload(store, "job") is UploadStatus.REPEATED
    await store.decide(decision("job"), keep_s=60)
    assert await upload(store, "job") is UploadStatus.GONE
    assert not await redis.exists(keys.features("job", "sb", "0-u-0"))


async def test_a_repeated_upload_spoils_nothing_that_is_still_to_score(store, monkeypatch):
    await queue_one(store)

    async def not_yet(*_):
        return False

    monkeypatch.setattr(store._client, "hexists", not_yet)  # as above
    assert await upload(store, "job") is UploadStatus.REPEATED
    (claim,) = await store.claim("c", count=1, block_s=1)
    assert claim.shard.features == b"features"


async def test_a_deleted_job_leaves_no_key(store, redis, keys, monkeypatch):
    monkeypatch.setattr(redis_store, "DELETE_BATCH", 3)
    await queue_one(store, job="other")
    await store.claim("c", count=1, block_s=1)
    before = await names(redis, keys)
    for i in range(10):
        await queue_one(store, super_batch_id=f"decided-{i}")
        await store.decide(decision("job", f"decided-{i}"), keep_s=60)
    for i in range(4):
        await queue_one(store, super_batch_id=f"open-{i}")
    for claim in await store.claim("c", count=3, block_s=1):
        await store.complete(claim, result_of(claim))
    await store.claim("c", count=1, block_s=1)
    await queue_one(store, super_batch_id="dead")
    await store.dead_letter(letter("job", "dead"))
    assert await store.delete_job("job")
    assert await names(redis, keys) - {"news"} == before
    assert await accounts(store, "other") == (1, 0, 0, 1)


async def test_the_index_of_decisions_holds_only_those_that_are_kept(store, redis, keys):
    await store.create_job(spec("job"), now_s=1.0)
    for super_batch_id, keep_s in (("short", 0.05), ("long", 60)):
        await submit(store, "job", super_batch_id)
        await store.decide(decision("job", super_batch_id), keep_s=keep_s)

    async def gone():
        return await store.get_decision("job", "short") is None

    await wait_for(gone)
    await submit(store, "job", "next")
    await store.decide(decision("job", "next"), keep_s=1)
    assert await redis.zrange(keys.decided("job"), 0, -1) == ["next", "long"]
    assert await redis.ttl(keys.decided("job")) > 50


async def test_news_are_capped(store, redis, keys):
    await store.create_job(spec("job"), now_s=1.0)
    async with redis.pipeline(transaction=False) as pipe:
        for i in range(6000):
            pipe.xadd(keys.news, {"job": "job", "id": str(i)})
        await pipe.execute()
    await submit(store, "job")
    await store.dead_letter(letter("job"))
    assert await redis.xlen(keys.news) < 4096 + 200  # whole nodes of some hundred entries are cut off


async def test_servers_with_other_prefixes_share_a_redis_and_nothing_else(shared_server, store):
    await queue_one(store)
    other = RedisSuperBatchStore.from_url(f"{shared_server.url}/0", prefix=key_prefix())
    assert await other.get_job("job") is None
    assert await other.claim("c", count=1, block_s=0.01) == []
    assert await other.dead_letter_overdue(now_s=time.time() + 1000) == []
    await other.close()


# Construction


@pytest.mark.parametrize("prefix", ["", "jest:", "{}:", "{jest:"])
def test_a_prefix_without_a_hash_tag_is_refused(prefix):
    with pytest.raises(ValueError, match="hash tag"):
        RedisSuperBatchStore.from_url("redis://127.0.0.1:1/0", prefix=prefix)


@pytest.mark.parametrize("url", ["redis://:hunter2/x@127.0.0.1:6379/0", "http://hunter2@127.0.0.1"])
def test_what_is_no_redis_url_is_refused_without_being_repeated(url):
    with pytest.raises(ValueError, match="not a Redis URL") as caught:
        RedisSuperBatchStore.from_url(url)
    assert caught.value.__suppress_context__
    assert "hunter2" not in str(caught.value)


async def test_a_password_is_in_no_message(server):
    async with Redis.from_url(f"{server.url}/0") as redis:
        await redis.config_set("requirepass", "right")
    secret = uuid.uuid4().hex
    for url in (f"redis://:{secret}@127.0.0.1:1/0", f"redis://:{secret}@127.0.0.1:{server.port}/0"):
        store = RedisSuperBatchStore.from_url(url)
        with pytest.raises(StoreUnavailable) as caught:
            await store.ping()
        assert secret not in str(caught.value)
        assert secret not in repr(vars(store))
        await store.close()


async def test_large_features_and_results_arrive_whole(store, monkeypatch):
    monkeypatch.setattr(redis_store, "WRITE_BATCH_BYTES", 1 << 20)
    monkeypatch.setattr(redis_store, "RESULT_BATCH", 2)
    await store.create_job(spec("job"), now_s=1.0)
    await submit(store, "job")
    features = [random.Random(i).randbytes(700_000 + i) for i in range(5)]
    shards = [shard("job", number=i, features=blob) for i, blob in enumerate(features)]
    await store.add_upload("job", "sb", 0, digest="u", positions=(0, 1), shards=shards)
    claims = await store.claim("c", count=5, block_s=1)
    assert [claim.shard.features for claim in claims] == features
    for i, claim in enumerate(claims):
        await store.complete(claim, result_of(claim, inferred=i))
    assert sorted(result.inferred for result in await store.get_results("job", "sb")) == list(range(5))
