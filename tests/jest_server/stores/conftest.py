"""Stores for the tests of this folder: every kind for the contract, and what only a real server offers."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from jest_server.stores.memory.super_batches import MemorySuperBatchStore
from jest_server.stores.redis.keys import Keys
from jest_server.stores.redis.super_batches import RedisSuperBatchStore
from support.servers import queue_kinds, queue_server_of
from support.super_batches import key_prefix, spec


@pytest.fixture(scope="module", params=["memory", *queue_kinds()])
def store_url(request, tmp_path_factory):
    """Where a store of each kind is; None stands for this process's memory."""
    if request.param == "memory":
        yield None
        return
    with queue_server_of(request.param, tmp_path_factory.mktemp("store")) as server:
        yield f"{server.url}/0"


@pytest.fixture
async def any_store(store_url):
    """A store of each kind, empty."""
    in_memory = store_url is None
    store = MemorySuperBatchStore() if in_memory else RedisSuperBatchStore.from_url(store_url, prefix=key_prefix())
    yield store
    await store.close()


@pytest.fixture
async def job(any_store):
    """A job that is registered."""
    await any_store.create_job(spec("job"), now_s=1.0)
    return "job"


@pytest.fixture(scope="module", params=queue_kinds())
def shared_server(request, tmp_path_factory):
    """A server for tests that leave it as it was."""
    with queue_server_of(request.param, tmp_path_factory.mktemp("shared")) as server:
        yield server


@pytest.fixture
def keys():
    """Names of the keys of ``redis_store``."""
    return Keys(key_prefix())


@pytest.fixture
async def redis_store(shared_server, keys):
    """An empty store on a real server."""
    store = RedisSuperBatchStore.from_url(f"{shared_server.url}/0", prefix=keys.prefix)
    yield store
    await store.close()


@pytest.fixture
async def redis(shared_server):
    """A bare client of the same server."""
    async with Redis.from_url(f"{shared_server.url}/0", decode_responses=True) as redis:
        yield redis


@pytest.fixture(params=queue_kinds())
def own_server(request, tmp_path):
    """A server of the test's own, to break."""
    with queue_server_of(request.param, tmp_path, append_only=True) as server:
        yield server


@pytest.fixture
async def own_store(own_server):
    """A store on ``own_server``."""
    store = RedisSuperBatchStore.from_url(f"{own_server.url}/0")
    yield store
    await store.close()
