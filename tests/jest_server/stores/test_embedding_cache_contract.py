"""One suite for every EmbeddingCache."""

from __future__ import annotations

import asyncio
import uuid

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from jest_server.domain.errors import StoreUnavailable
from jest_server.domain.references import ReferenceInfo
from jest_server.domain.storage import Lease
from jest_server.runtime.metrics import EmbeddingFileMetrics
from jest_server.stores.embedding_files.files import EmbeddingFiles
from jest_server.stores.redis.embedding_cache import RedisEmbeddingCache
from jest_server.stores.tiered_cache import TieredEmbeddingCache
from support.memory_stores.embedding_cache import MemoryEmbeddingCache
from support.servers import QUEUE_KINDS, queue_server_of

VALUE = bytes(range(16))


@pytest.fixture(scope="module", params=["memory", "tiered", *QUEUE_KINDS])
def cache_url(request, tmp_path_factory):
    if request.param in {"memory", "tiered"}:
        yield request.param
        return
    with queue_server_of(request.param, tmp_path_factory.mktemp("cache")) as server:
        yield f"{server.url}/1"


@pytest.fixture
async def make_cache(cache_url, tmp_path):
    """Makes caches that share what they hold, where a server holds it."""
    caches = []

    def make(**options):
        if cache_url == "memory":
            caches.append(MemoryEmbeddingCache(**options))
        elif cache_url == "tiered":
            files = EmbeddingFiles(str(tmp_path), EmbeddingFileMetrics(CollectorRegistry()))
            caches.append(TieredEmbeddingCache(MemoryEmbeddingCache(**options), files))
        else:
            caches.append(RedisEmbeddingCache.from_url(cache_url, **options))
        return caches[-1]

    yield make
    for cache in caches:
        await cache.close()


@pytest.fixture
def cache(make_cache):
    return make_cache()


def reference(**fields):
    values = {"name": uuid.uuid4().hex, "version": "1", "preprocessing_id": "p", "scale": 1.0, "bias": 0.0}
    return ReferenceInfo(**values | {"embedding_width": 4, "inputs": ()} | fields)


async def test_what_was_put_is_found_in_the_order_asked(cache):
    info = reference()
    await cache.put(info, {"a": VALUE, "b": VALUE[::-1]})
    assert await cache.get(info, ["b", "c", "a", "b"]) == [VALUE[::-1], None, VALUE, VALUE[::-1]]


async def test_asking_for_nothing_finds_nothing(cache):
    await cache.put(reference(), {})
    assert await cache.get(reference(), []) == []


@pytest.mark.parametrize("other", [{"name": "other"}, {"version": "2"}, {"preprocessing_id": "q"}])
async def test_another_model_version_or_preprocessing_is_another_space(cache, other):
    info = reference()
    await cache.put(info, {"a": VALUE})
    assert await cache.get(info.model_copy(update=other), ["a"]) == [None]


async def test_a_value_of_another_width_counts_as_absent(cache):
    info = reference()
    await cache.put(info, {"a": VALUE[:-2], "b": VALUE})
    assert await cache.get(info, ["a", "b"]) == [None, VALUE]


@pytest.mark.parametrize("precision", ["float16", "int8"])
async def test_what_is_put_comes_back_as_it_will_be_found(make_cache, precision):
    """So that who has just computed an embedding uses the same bytes as who finds it."""
    cache, info = make_cache(precision=precision), reference(embedding_width=32)
    rows = np.random.default_rng(0).standard_normal((2500, 2, 32)).astype(np.float16)
    values = {f"k{i}": row.tobytes() for i, row in enumerate(rows)}
    written = await cache.put(info, values)
    assert await cache.get(info, list(values)) == list(written.values())
    assert (written == values) == (precision == "float16")
    found = np.frombuffer(b"".join(written.values()), np.float16).reshape(rows.shape)
    largest = np.abs(rows).max(axis=2, keepdims=True)
    assert (np.abs(found - rows) <= largest / 127 * 0.51 + 1e-3).all()


async def test_caches_of_another_precision_do_not_mix(make_cache):
    exact, small = make_cache(), make_cache(precision="int8")
    info = reference()
    await exact.put(info, {"a": VALUE})
    assert await small.get(info, ["a"]) == [None]


async def test_more_keys_than_one_round_trip_holds_keep_their_order(cache):
    info = reference()
    values = {f"k{i}": i.to_bytes(16, "little") for i in range(2500)}
    await cache.put(info, values)
    assert await cache.get(info, list(values)) == list(values.values())


async def test_keys_of_any_length_and_script_are_kept_apart(cache):
    info = reference()
    values = {"é" * 256: VALUE, "é" * 255: VALUE[::-1], "a/b:c\n": bytes(16)}
    await cache.put(info, values)
    assert await cache.get(info, list(values)) == list(values.values())


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", ["float16", "int8"])
async def test_a_value_that_is_not_finite_is_refused_and_leaves_its_key_free(make_cache, broken, precision):
    cache, info = make_cache(precision=precision), reference()
    value = np.ones(8, np.float16)
    value[5] = broken
    with pytest.raises(ValueError, match="the embedding of 'b' is not finite"):
        await cache.put(info, {"a": VALUE, "b": value.tobytes()})
    assert await cache.get(info, ["a", "b"]) == [None, None]
    assert await cache.take(info, ["b"], owner="o", ttl_s=1) == [Lease.MINE]


async def test_who_comes_first_wins_and_the_second_is_told(cache):
    """So that everybody uses the same bytes, also if an example was computed twice."""
    info = reference()
    await cache.put(info, {"a": VALUE})
    assert await cache.put(info, {"a": VALUE[::-1], "b": VALUE[::-1]}) == {"a": VALUE, "b": VALUE[::-1]}
    assert await cache.get(info, ["a", "b"]) == [VALUE, VALUE[::-1]]


async def test_a_value_of_a_wrong_size_is_replaced(cache):
    info = reference()
    await cache.put(info.model_copy(update={"embedding_width": 2}), {"a": VALUE[:8]})
    assert await cache.put(info, {"a": VALUE}) == {"a": VALUE}
    assert await cache.get(info, ["a"]) == [VALUE]


MINE, OTHERS = Lease.MINE, Lease.OTHERS


async def test_only_one_computes_what_is_not_there(cache):
    info = reference()
    await cache.put(info, {"c": VALUE})
    assert await cache.take(info, ["a", "c"], owner="one", ttl_s=60) == [MINE, VALUE]
    assert await cache.take(info, ["a", "b", "c"], owner="two", ttl_s=60) == [OTHERS, MINE, VALUE]


async def test_taking_again_what_is_ones_own_keeps_it(cache):
    info = reference()
    assert await cache.take(info, ["a"], owner="one", ttl_s=60) == [MINE]
    assert await cache.take(info, ["a"], owner="one", ttl_s=60) == [MINE]


async def test_what_was_put_is_found_by_who_waited_for_it(cache):
    info = reference()
    await cache.take(info, ["a"], owner="one", ttl_s=60)
    await cache.put(info, {"a": VALUE})
    assert await cache.take(info, ["a"], owner="two", ttl_s=60) == [VALUE]


async def test_what_is_given_back_is_free_at_once(cache):
    info = reference()
    await cache.take(info, ["a", "b"], owner="one", ttl_s=60)
    await cache.release_leases(info, ["a"], owner="one")
    assert await cache.take(info, ["a", "b"], owner="two", ttl_s=60) == [MINE, OTHERS]


async def test_nobody_gives_back_or_renews_what_is_not_theirs(cache):
    info = reference()
    await cache.take(info, ["a"], owner="one", ttl_s=60)
    await cache.release_leases(info, ["a", "b"], owner="two")
    await cache.renew(info, ["b"], owner="two", ttl_s=60)
    assert await cache.take(info, ["a", "b"], owner="three", ttl_s=60) == [OTHERS, MINE]


async def test_a_lease_ends_unless_it_is_renewed(cache):
    info = reference()
    await cache.take(info, ["a", "b"], owner="one", ttl_s=1.0)
    await cache.renew(info, ["a"], owner="one", ttl_s=60)
    await asyncio.sleep(1.2)
    assert await cache.take(info, ["a", "b"], owner="two", ttl_s=60) == [OTHERS, MINE]


@pytest.mark.parametrize("other", [{"name": "other"}, {"version": "2"}, {"preprocessing_id": "q"}])
async def test_leases_of_another_space_are_others(cache, other):
    info = reference()
    await cache.take(info, ["a"], owner="one", ttl_s=60)
    assert await cache.take(info.model_copy(update=other), ["a"], owner="two", ttl_s=60) == [MINE]


async def test_more_keys_than_one_round_trip_holds_are_leased_in_order(cache):
    info = reference()
    values = {f"k{i}": i.to_bytes(16, "little") for i in range(2500)}
    await cache.put(info, {key: value for key, value in values.items() if key.endswith("7")})
    expected = [value if key.endswith("7") else MINE for key, value in values.items()]
    assert await cache.take(info, list(values), owner="one", ttl_s=60) == expected


async def test_any_number_of_takers_at_once_compute_each_value_once(make_cache):
    info, keys = reference(), [f"k{i}" for i in range(50)]
    shared = make_cache()
    computed = []

    async def taker(name):
        rest = list(keys)
        while rest:
            taken = await shared.take(info, rest, owner=name, ttl_s=60)
            mine = [key for key, whose in zip(rest, taken, strict=True) if whose is MINE]
            rest = [key for key, whose in zip(rest, taken, strict=True) if whose is OTHERS]
            await asyncio.sleep(0)
            computed.extend(mine)
            await shared.put(info, dict.fromkeys(mine, VALUE))
            await shared.release_leases(info, mine, owner=name)

    await asyncio.gather(*(taker(f"taker-{i}") for i in range(8)))
    assert sorted(computed) == sorted(keys)


async def test_a_cache_tells_how_full_it_is_and_how_often_it_had_what_was_asked_for(cache):
    before, info = await cache.stats(), reference()
    await cache.put(info, {"a": VALUE, "b": VALUE})
    filled = await cache.stats()
    await cache.get(info, ["a", "b", "c"])
    after = await cache.stats()
    assert filled.values - before.values == 2
    assert filled.used_bytes > before.used_bytes
    assert (after.hits - filled.hits, after.misses - filled.misses) == (2, 1)


async def test_tenants_that_do_not_share_neither_find_nor_wait_for_each_others(make_cache):
    cache, info = make_cache(shared=False), reference()
    red, blue, none = (cache.for_tenant_of(job) for job in ("red~job", "blue~job", "job"))
    assert await red.put(info, {"a": VALUE}) == {"a": VALUE}
    assert await red.get(info, ["a"]) == await cache.for_tenant_of("red~other").get(info, ["a"]) == [VALUE]
    assert await blue.get(info, ["a"]) == await none.get(info, ["a"]) == [None]
    assert await blue.take(info, ["a", "b"], owner="blue", ttl_s=60) == [MINE, MINE]
    assert await red.take(info, ["a", "b"], owner="red", ttl_s=60) == [VALUE, MINE]
    await blue.renew(info, ["b"], owner="blue", ttl_s=60)
    await blue.release_leases(info, ["b"], owner="blue")
    assert await blue.for_tenant_of("blue~job").take(info, ["b"], owner="other", ttl_s=60) == [MINE]
    assert await red.take(info, ["b"], owner="other", ttl_s=60) == [OTHERS]


async def test_tenants_that_share_find_each_others(make_cache):
    cache, info = make_cache(), reference()
    await cache.for_tenant_of("red~job").put(info, {"a": VALUE})
    assert await cache.for_tenant_of("blue~job").get(info, ["a"]) == [VALUE]


@pytest.fixture(params=QUEUE_KINDS)
def server(request, tmp_path):
    with queue_server_of(request.param, tmp_path) as server:
        yield server


async def test_keys_are_short_whatever_the_example_is_called(server):
    cache, info = RedisEmbeddingCache.from_url(f"{server.url}/1"), reference(name="m" * 256)
    await cache.put(info, {"x" * 4096: VALUE, "y": VALUE})
    await cache.close()
    async with Redis.from_url(f"{server.url}/1", decode_responses=True) as redis:
        keys = await redis.keys("*")
    assert {len(key) for key in keys} == {len("jest:e:") + 16 + 1 + 32}
    assert len({key.rpartition(":")[0] for key in keys}) == 1


@pytest.mark.parametrize(("ttl_s", "expected"), [(None, {-1}), (60.0, {59, 60})])
async def test_values_live_until_evicted_or_as_long_as_asked(server, ttl_s, expected):
    cache = RedisEmbeddingCache.from_url(f"{server.url}/1", ttl_s=ttl_s)
    await cache.put(reference(), {"a": VALUE})
    await cache.close()
    async with Redis.from_url(f"{server.url}/1") as redis:
        (key,) = await redis.keys("*")
        assert await redis.ttl(key) in expected


async def test_int8_takes_half_the_space(server):
    info = reference(embedding_width=768)
    sizes = {}
    for precision in ("float16", "int8"):
        cache = RedisEmbeddingCache.from_url(f"{server.url}/1", precision=precision)
        await cache.put(info, {precision: bytes(info.value_bytes)})
        await cache.close()
        async with Redis.from_url(f"{server.url}/1") as redis:
            (key,) = await redis.keys("*")
            sizes[precision] = await redis.strlen(key)
            await redis.flushdb()
    assert sizes["int8"] == pytest.approx(sizes["float16"] / 2, rel=0.01)


async def test_a_cache_that_is_full_or_away_says_so(server):
    cache, info = RedisEmbeddingCache.from_url(f"{server.url}/1"), reference()
    async with Redis.from_url(f"{server.url}/1") as redis:
        await redis.config_set("maxmemory", "1")
    with pytest.raises(StoreUnavailable, match=r"the cache does not answer: OutOfMemoryError$"):
        await cache.put(info, {"a": VALUE})
    server.stop()
    for call in (
        cache.ping(),
        cache.stats(),
        cache.get(info, ["a"]),
        cache.put(info, {"a": VALUE}),
        cache.take(info, ["a"], owner="one", ttl_s=1),
        cache.renew(info, ["a"], owner="one", ttl_s=1),
        cache.release_leases(info, ["a"], owner="one"),
    ):
        with pytest.raises(StoreUnavailable, match="the cache does not answer"):
            await call
    await cache.close()


async def test_the_twin_in_memory_forgets_what_was_unused_longest():
    cache, info = MemoryEmbeddingCache(max_bytes=32), reference()
    await cache.put(info, {"a": VALUE, "b": VALUE})
    await cache.get(info, ["a"])
    await cache.put(info, {"c": VALUE})
    assert await cache.get(info, ["a", "b", "c"]) == [VALUE, None, VALUE]
