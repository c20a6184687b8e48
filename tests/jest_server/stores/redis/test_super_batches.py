"""Super-batches on a real server: uploads that break off, large ones, and events across restarts."""

from __future__ import annotations

import asyncio
import random
import time
import uuid

import pytest

from jest_server.domain.errors import StoreUnavailable
from jest_server.domain.super_batches import Limits, SuperBatchRef, UploadStatus
from jest_server.stores.redis import super_batches
from jest_server.stores.redis.stores import open_redis_stores
from support.polling import wait_for
from support.servers import queue_server_of
from support.super_batches import (
    REFERENCE,
    dead_letter,
    decision,
    queue_one,
    result_of,
    shard,
    spec,
    submit,
    upload,
)


async def test_features_of_an_uploader_that_died_before_queueing_go_soon(stores, redis, keys, monkeypatch):
    await stores.jobs.create_job(spec("job"), now_s=1.0)
    await submit(stores, "job")

    async def die(*_keys, **_):
        raise asyncio.CancelledError

    monkeypatch.setattr(stores.super_batches, "_add_upload", die)
    with pytest.raises(asyncio.CancelledError):
        await upload(stores, "job")
    assert 0 < await redis.ttl(keys.features(SuperBatchRef("job", "sb"), "0-u-000")) <= super_batches.UNQUEUED_S
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


async def test_a_repeated_upload_leaves_no_features_behind(stores, redis, keys, monkeypatch):
    await queue_one(stores)
    (claim,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    await stores.queue.complete(claim, result_of(claim))

    async def not_yet(*_):
        return False

    monkeypatch.setattr(
        stores.connection.client, "hexists", not_yet
    )  # the repeat began before the first upload was queued
    assert await upload(stores, "job") is UploadStatus.REPEATED
    await stores.decisions.decide(decision("job"), keep_s=60)
    assert await upload(stores, "job") is UploadStatus.GONE
    assert not await redis.exists(keys.features(SuperBatchRef("job", "sb"), "0-u-000"))


async def test_a_repeated_upload_spoils_nothing_that_is_still_to_score(stores, monkeypatch):
    await queue_one(stores)

    async def not_yet(*_):
        return False

    monkeypatch.setattr(stores.connection.client, "hexists", not_yet)  # as above
    assert await upload(stores, "job") is UploadStatus.REPEATED
    (claim,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    assert claim.shard.features == b"features"


async def test_large_features_and_results_arrive_whole(stores, monkeypatch):
    monkeypatch.setattr(super_batches, "WRITE_BATCH_BYTES", 1 << 20)
    monkeypatch.setattr(super_batches, "RESULT_BATCH", 2)
    await stores.jobs.create_job(spec("job"), now_s=1.0)
    await submit(stores, "job")
    features = [random.Random(i).randbytes(700_000 + i) for i in range(5)]
    shards = [shard("job", number=i, features=blob) for i, blob in enumerate(features)]
    await stores.super_batches.add_upload(
        SuperBatchRef("job", "sb"), 0, digest="u", positions=(0, 1), shards=shards, limits=Limits()
    )
    claims = await stores.queue.claim("c", REFERENCE, count=5, block_s=1)
    assert [claim.shard.features for claim in claims] == features
    for i, claim in enumerate(claims):
        await stores.queue.complete(claim, result_of(claim, inferred=i))
    assert sorted(
        result.inferred for result in await stores.super_batches.get_results(SuperBatchRef("job", "sb"))
    ) == list(range(5))


async def test_nothing_is_remembered_of_what_holds_nothing(own_server, own_stores):
    await own_stores.jobs.create_job(spec("red~one"), now_s=1.0)
    await submit(own_stores, "red~one", "a")
    await upload(own_stores, "red~one", "a", features=bytes(1000))
    await own_stores.decisions.decide(decision("red~one", "a"), keep_s=60)
    assert await own_stores.connection.client.exists("{jest}:usage") == 0


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


async def test_events_go_on_after_a_restart_that_forgot_everything(tmp_path):
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


async def test_events_go_on_though_their_ids_start_again(stores, redis, keys, monkeypatch):
    monkeypatch.setattr(super_batches, "EVENT_BLOCK_S", 0.05)
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


async def test_events_are_capped(stores, redis, keys):
    await stores.jobs.create_job(spec("job"), now_s=1.0)
    async with redis.pipeline(transaction=False) as pipe:
        for i in range(6000):
            pipe.xadd(keys.events, {"job": "job", "id": str(i)})
        await pipe.execute()
    await submit(stores, "job")
    await stores.decisions.dead_letter(dead_letter("job"))
    assert await redis.xlen(keys.events) < 4096 + 200  # whole nodes of some hundred entries are cut off


async def test_times_keep_all_their_digits_on_the_way_into_a_script(stores, redis, keys):
    now_s = 1_700_000_000.123457
    await stores.jobs.create_job(spec("job"), now_s=1.0)
    await submit(stores, "job", now_s=now_s, ttl_s=60.1)
    assert await redis.zscore(keys.in_flight, "job/sb") == now_s + 60.1
    assert (await stores.super_batches.get_super_batch(SuperBatchRef("job", "sb"))).created_at_s == now_s
