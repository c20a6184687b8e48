"""Servers that are away, silent, full, demoted or share a pool with hundreds of callers; and URLs."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
import uuid
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from jest_server.domain.errors import StoreUnavailable
from jest_server.domain.super_batches import SubmitStatus, SuperBatchRef
from jest_server.stores.redis import connection
from jest_server.stores.redis.stores import open_redis_stores
from support.polling import within
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


@asynccontextmanager
async def configured(redis, name, value):
    """Runs the block with another server setting."""
    before = (await redis.config_get(name))[name]
    await redis.config_set(name, value)
    try:
        yield
    finally:
        await redis.config_set(name, before)


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


@pytest.mark.parametrize("url", ["redis://:hunter2/x@127.0.0.1:6379/0", "http://hunter2@127.0.0.1"])
def test_what_is_no_redis_url_is_refused_without_being_repeated(url):
    with pytest.raises(ValueError, match="not a Redis URL") as caught:
        open_redis_stores(url)
    assert caught.value.__suppress_context__
    assert "hunter2" not in str(caught.value)


async def test_a_password_is_in_no_message(own_server):
    async with Redis.from_url(f"{own_server.url}/0") as redis:
        await redis.config_set("requirepass", "right")
    secret = uuid.uuid4().hex
    for url in (f"redis://:{secret}@127.0.0.1:1/0", f"redis://:{secret}@127.0.0.1:{own_server.port}/0"):
        stores = open_redis_stores(url)
        with pytest.raises(StoreUnavailable) as caught:
            await stores.connection.ping()
        assert secret not in str(caught.value)
        assert secret not in repr(stores)
        await stores.connection.close()
