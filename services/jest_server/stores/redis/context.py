"""What the stores of the queue share: connections to one Redis and the names of its keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from jest_server.domain.ports import StoreConnection
from jest_server.domain.storage import MemoryUse
from jest_server.stores.redis.connection import Script, connect, translate_redis_errors
from jest_server.stores.redis.keys import DEFAULT_PREFIX, Keys

if TYPE_CHECKING:
    from redis.asyncio import Redis


@dataclass(frozen=True)
class RedisContext(StoreConnection):
    """Two clients of one Redis and its keys; `blocking` is for reads that block, so that no other command waits."""

    client: Redis
    blocking: Redis
    keys: Keys

    @classmethod
    def from_url(cls, url: str, *, prefix: str = DEFAULT_PREFIX) -> RedisContext:
        """Connect lazily. All keys start with `prefix`, which holds a hash tag.

        Raises:
            ValueError: If `url` or `prefix` is invalid; a URL is not repeated in the message.
        """
        keys = Keys(prefix)
        return cls(connect(url), connect(url), keys)

    def script(self, *names: str) -> Script:
        """Return `lua/NAME.lua` as a function; of several, the first define functions for the last."""
        return Script(self.client, *names)

    @override
    async def ping(self) -> None:
        async with translate_redis_errors("queue"):
            await self.client.ping()

    @override
    async def memory(self) -> MemoryUse:
        async with translate_redis_errors("queue"):
            memory: Any = await self.client.info("memory")
        return MemoryUse(used_bytes=memory["used_memory"], max_bytes=memory["maxmemory"])

    @override
    async def close(self) -> None:
        await self.client.aclose()
        await self.blocking.aclose()
