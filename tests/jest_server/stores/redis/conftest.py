"""Stores on a real server, and the names of their keys."""

from __future__ import annotations

import pytest

from jest_server.stores.redis.keys import Keys
from jest_server.stores.redis.stores import open_redis_stores
from support.super_batches import key_prefix


@pytest.fixture
def keys():
    """Names of the keys of `stores`."""
    return Keys(key_prefix())


@pytest.fixture
async def stores(shared_server, keys):
    """Empty stores on a real server."""
    stores = open_redis_stores(f"{shared_server.url}/0", prefix=keys.prefix)
    yield stores
    await stores.connection.close()
