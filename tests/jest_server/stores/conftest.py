"""Stores for the tests of this folder: every kind for the contracts, and what only a real server offers."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from jest_server.stores.redis.stores import open_redis_stores
from support.memory_stores.stores import open_memory_stores
from support.servers import QUEUE_KINDS, queue_server_of
from support.super_batches import key_prefix, spec


@pytest.fixture(scope="module", params=["memory", *QUEUE_KINDS])
def stores_url(request, tmp_path_factory):
    """Where stores of each kind are; None stands for this process's memory."""
    if request.param == "memory":
        yield None
        return
    with queue_server_of(request.param, tmp_path_factory.mktemp("stores")) as server:
        yield f"{server.url}/0"


@pytest.fixture
async def stores(stores_url):
    """Empty stores of each kind."""
    in_memory = stores_url is None
    stores = open_memory_stores() if in_memory else open_redis_stores(stores_url, prefix=key_prefix())
    yield stores
    await stores.connection.close()


@pytest.fixture
async def job(stores):
    """A job that is registered."""
    await stores.jobs.create_job(spec("job"), now_s=1.0)
    return "job"


@pytest.fixture(params=QUEUE_KINDS)
def own_server(request, tmp_path):
    """A server of the test's own, to break."""
    with queue_server_of(request.param, tmp_path, append_only=True) as server:
        yield server


@pytest.fixture
async def own_stores(own_server):
    """Stores on `own_server`."""
    stores = open_redis_stores(f"{own_server.url}/0")
    yield stores
    await stores.connection.close()


@pytest.fixture(scope="module", params=QUEUE_KINDS)
def shared_server(request, tmp_path_factory):
    """A server for tests that leave it as it was."""
    with queue_server_of(request.param, tmp_path_factory.mktemp("shared")) as server:
        yield server


@pytest.fixture
async def redis(shared_server):
    """A bare client of the same server."""
    async with Redis.from_url(f"{shared_server.url}/0", decode_responses=True) as redis:
        yield redis
