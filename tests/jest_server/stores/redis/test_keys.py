"""Which keys are there when, how long they live, and what a store on Redis is made of."""

from __future__ import annotations

import random
import time
import uuid

import pytest
from redis.asyncio import Redis

from jest_server.domain.errors import StoreUnavailable
from jest_server.domain.super_batches import Limits, UploadStatus
from jest_server.stores.redis import jobs
from jest_server.stores.redis import super_batches as redis_store_module
from jest_server.stores.redis.keys import GROUP, Keys, line_of
from jest_server.stores.redis.super_batches import RedisSuperBatchStore
from support.polling import wait_for
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

LINE = line_of(REFERENCE.name, REFERENCE.version)


async def names(redis, keys):
    """Returns all keys under a prefix without it."""
    return {name.removeprefix(keys.prefix) for name in await redis.keys(f"{keys.prefix}*")}


async def test_all_keys_have_the_prefix_and_all_but_the_documented_expire(own_server, own_store):
    store, keys = own_store, Keys()
    await queue_one(store)
    (claim,) = await store.claim("c", REFERENCE, count=1, block_s=1)
    await store.complete(claim, result_of(claim))
    await queue_one(store, super_batch_id="open")
    for super_batch_id in ("decided", "dead"):
        await queue_one(store, super_batch_id=super_batch_id)
    await store.decide(decision("job", "decided"), keep_s=60)
    await store.dead_letter(letter("job", "dead"))
    await store.announce_reference(REFERENCE, ttl_s=5)
    lasting = {
        *(keys.jobs, keys.weights, keys.in_flight, keys.usage, keys.queued, keys.lines, keys.news, keys.models),
        *(keys.counters("job"), keys.shards(LINE), keys.turns(LINE), keys.waiting(LINE, "job")),
    }
    expiring = {
        keys.super_batch("job", "sb"),
        keys.super_batch("job", "open"),
        keys.results("job", "sb"),
        keys.features("job", "open", "0-u-000"),
        keys.decision("job", "decided"),
        keys.decided("job"),
        keys.dead("job"),
        keys.dead_order("job"),
        keys.reference("ref"),
        keys.bell(LINE),
        keys.set_aside("job", "dead"),
        f"{keys.prefix}now:{LINE}",
    }
    async with Redis.from_url(f"{own_server.url}/0", decode_responses=True) as redis:
        held = set(await redis.keys("*"))
        assert {key for key in held if await redis.ttl(key) > 0} == expiring
    assert held == lasting | expiring


async def test_what_a_super_batch_holds_lives_as_long_as_it_may(redis_store, redis, keys):
    week_s = 7 * 86400
    await redis_store.create_job(spec("job"), now_s=1.0)
    await submit(redis_store, "job", ttl_s=week_s)
    await upload(redis_store, "job", shards=2)
    claim, _ = await redis_store.claim("c", REFERENCE, count=2, block_s=1)
    await redis_store.complete(claim, result_of(claim))
    for key in (keys.super_batch("job", "sb"), keys.results("job", "sb"), keys.features("job", "sb", "0-u-001")):
        assert await redis.ttl(key) > week_s


@pytest.mark.parametrize("how", ["decide", "dead_letter", "overdue"])
async def test_nothing_heavy_is_left_of_what_left_flight(redis_store, redis, keys, how):
    await queue_one(redis_store)
    (claim,) = await redis_store.claim("c", REFERENCE, count=1, block_s=1)
    await upload(redis_store, "job", shards=3, digest="v")
    await redis_store.claim("c", REFERENCE, count=2, block_s=1)
    await redis_store.complete(claim, result_of(claim))
    if how == "decide":
        await redis_store.decide(decision("job"), keep_s=60)
    elif how == "dead_letter":
        await redis_store.dead_letter(letter("job"))
    else:
        await redis_store.dead_letter_overdue(now_s=time.time() + 1000)
    heavy = ("features", "results", "super_batch")
    assert [name for name in await names(redis, keys) if name.startswith(heavy)] == []
    assert (await redis.xpending(keys.shards(LINE), GROUP))["pending"] == 0


async def test_a_repeated_upload_leaves_no_features_behind(redis_store, redis, keys, monkeypatch):
    await queue_one(redis_store)
    (claim,) = await redis_store.claim("c", REFERENCE, count=1, block_s=1)
    await redis_store.complete(claim, result_of(claim))

    async def not_yet(*_):
        return False

    monkeypatch.setattr(redis_store._client, "hexists", not_yet)  # the repeat began before the first upload was queued
    assert await upload(redis_store, "job") is UploadStatus.REPEATED
    await redis_store.decide(decision("job"), keep_s=60)
    assert await upload(redis_store, "job") is UploadStatus.GONE
    assert not await redis.exists(keys.features("job", "sb", "0-u-000"))


async def test_a_repeated_upload_spoils_nothing_that_is_still_to_score(redis_store, monkeypatch):
    await queue_one(redis_store)

    async def not_yet(*_):
        return False

    monkeypatch.setattr(redis_store._client, "hexists", not_yet)  # as above
    assert await upload(redis_store, "job") is UploadStatus.REPEATED
    (claim,) = await redis_store.claim("c", REFERENCE, count=1, block_s=1)
    assert claim.shard.features == b"features"


async def test_a_release_brings_nothing_back_of_what_ran_out(redis_store, redis, keys):
    await queue_one(redis_store)
    claims = await redis_store.claim("c", REFERENCE, count=1, block_s=1)
    await redis.delete(keys.super_batch("job", "sb"))  # as its backstop would
    await redis_store.release("c", claims)
    assert await redis_store.queue_depth() == 0
    assert not await redis.exists(keys.super_batch("job", "sb"))


async def test_a_deleted_job_leaves_no_key(redis_store, redis, keys, monkeypatch):
    monkeypatch.setattr(jobs, "DELETE_BATCH", 3)
    await queue_one(redis_store, job="other")
    await redis_store.claim("c", REFERENCE, count=1, block_s=1)
    before = await names(redis, keys)
    for i in range(10):
        await queue_one(redis_store, super_batch_id=f"decided-{i}")
        await redis_store.decide(decision("job", f"decided-{i}"), keep_s=60)
    for i in range(4):
        await queue_one(redis_store, super_batch_id=f"open-{i}")
    for claim in await redis_store.claim("c", REFERENCE, count=3, block_s=1):
        await redis_store.complete(claim, result_of(claim))
    await redis_store.claim("c", REFERENCE, count=1, block_s=1)
    await queue_one(redis_store, super_batch_id="dead")
    await redis_store.dead_letter(letter("job", "dead"))
    assert await redis_store.delete_job("job")
    assert await names(redis, keys) - before <= {"news"}
    assert not await redis.zscore(f"{keys.prefix}past_turns:{LINE}", "job")
    assert await accounts(redis_store, "other") == (1, 0, 0, 1)


async def test_the_index_of_decisions_holds_only_those_that_are_kept(redis_store, redis, keys):
    await redis_store.create_job(spec("job"), now_s=1.0)
    for super_batch_id, keep_s in (("short", 0.05), ("long", 60)):
        await submit(redis_store, "job", super_batch_id)
        await redis_store.decide(decision("job", super_batch_id), keep_s=keep_s)

    async def gone():
        return await redis_store.get_decision("job", "short") is None

    await wait_for(gone)
    await submit(redis_store, "job", "next")
    await redis_store.decide(decision("job", "next"), keep_s=1)
    assert await redis.zrange(keys.decided("job"), 0, -1) == ["next", "long"]
    assert await redis.ttl(keys.decided("job")) > 50


async def test_news_are_capped(redis_store, redis, keys):
    await redis_store.create_job(spec("job"), now_s=1.0)
    async with redis.pipeline(transaction=False) as pipe:
        for i in range(6000):
            pipe.xadd(keys.news, {"job": "job", "id": str(i)})
        await pipe.execute()
    await submit(redis_store, "job")
    await redis_store.dead_letter(letter("job"))
    assert await redis.xlen(keys.news) < 4096 + 200  # whole nodes of some hundred entries are cut off


async def test_servers_with_other_prefixes_share_a_redis_and_nothing_else(shared_server, redis_store):
    await queue_one(redis_store)
    other = RedisSuperBatchStore.from_url(f"{shared_server.url}/0", prefix=key_prefix())
    assert await other.get_job("job") is None
    assert await other.claim("c", REFERENCE, count=1, block_s=0.01) == []
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


async def test_a_password_is_in_no_message(own_server):
    async with Redis.from_url(f"{own_server.url}/0") as redis:
        await redis.config_set("requirepass", "right")
    secret = uuid.uuid4().hex
    for url in (f"redis://:{secret}@127.0.0.1:1/0", f"redis://:{secret}@127.0.0.1:{own_server.port}/0"):
        store = RedisSuperBatchStore.from_url(url)
        with pytest.raises(StoreUnavailable) as caught:
            await store.ping()
        assert secret not in str(caught.value)
        assert secret not in repr(vars(store))
        await store.close()


async def test_large_features_and_results_arrive_whole(redis_store, monkeypatch):
    monkeypatch.setattr(redis_store_module, "WRITE_BATCH_BYTES", 1 << 20)
    monkeypatch.setattr(redis_store_module, "RESULT_BATCH", 2)
    await redis_store.create_job(spec("job"), now_s=1.0)
    await submit(redis_store, "job")
    features = [random.Random(i).randbytes(700_000 + i) for i in range(5)]
    shards = [shard("job", number=i, features=blob) for i, blob in enumerate(features)]
    await redis_store.add_upload("job", "sb", 0, digest="u", positions=(0, 1), shards=shards, limits=Limits())
    claims = await redis_store.claim("c", REFERENCE, count=5, block_s=1)
    assert [claim.shard.features for claim in claims] == features
    for i, claim in enumerate(claims):
        await redis_store.complete(claim, result_of(claim, inferred=i))
    assert sorted(result.inferred for result in await redis_store.get_results("job", "sb")) == list(range(5))
