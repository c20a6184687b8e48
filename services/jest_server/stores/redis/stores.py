"""The four stores of the queue on one Redis 7 or Valkey. Every change of state is one Lua script; see `keys`."""

from __future__ import annotations

from jest_server.domain.ports import Stores
from jest_server.stores.redis.context import RedisContext
from jest_server.stores.redis.decisions import RedisDecisionLog
from jest_server.stores.redis.jobs import RedisJobStore
from jest_server.stores.redis.keys import DEFAULT_PREFIX
from jest_server.stores.redis.shard_queue import RedisShardQueue
from jest_server.stores.redis.super_batches import RedisSuperBatchStore


def open_redis_stores(url: str, *, prefix: str = DEFAULT_PREFIX) -> Stores:
    """Connect lazily. All keys start with `prefix`, which holds a hash tag.

    Raises:
        ValueError: If `url` or `prefix` is invalid; a URL is not repeated in the message.
    """
    context = RedisContext.from_url(url, prefix=prefix)
    return Stores(
        connection=context,
        jobs=RedisJobStore(context),
        super_batches=RedisSuperBatchStore(context),
        queue=RedisShardQueue(context),
        decisions=RedisDecisionLog(context),
    )
