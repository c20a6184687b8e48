"""EmbeddingCache on Redis: one string per example, in a key space per model, version and preprocessing.

Key `jest:e:SPACE:EXAMPLE`, both parts BLAKE2b digests: of model name, version, preprocessing id and, unless it is
float16, precision (8 bytes), and of the example key (16 bytes). Value: see ``embedding_codec``. Lives until evicted,
or for ``ttl_s``.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from jest_server.adapters.redis_connection import answering, connect, milliseconds, run
from jest_server.embedding_codec import CODECS, decoded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from redis.asyncio import Redis

    from jest_server.embedding_codec import Precision
    from jest_server.model import ReferenceInfo

_BATCH = 1000


class RedisEmbeddingCache:
    """Reference embeddings in a Redis that may evict them."""

    def __init__(self, client: Redis, *, ttl_s: float | None = None, precision: Precision = "float16") -> None:
        self._client = client
        self._codec = CODECS[precision]
        self._ttl_ms = None if ttl_s is None else milliseconds(ttl_s)

    @classmethod
    def from_url(cls, url: str, *, ttl_s: float | None = None, precision: Precision = "float16") -> RedisEmbeddingCache:
        """Connects lazily."""
        return cls(connect(url), ttl_s=ttl_s, precision=precision)

    async def get(self, reference: ReferenceInfo, keys: Sequence[str]) -> list[bytes | None]:
        """See the port."""
        space = self._space(reference)
        values: list[bytes | None] = []
        for start in range(0, len(keys), _BATCH):
            names = [_key(space, key) for key in keys[start : start + _BATCH]]
            async with answering("cache"):
                held: list[Any] = await self._client.mget(names)
            values += decoded(self._codec, held, reference)
        return values

    async def put(self, reference: ReferenceInfo, values: Mapping[str, bytes]) -> dict[str, bytes]:
        """See the port."""
        space = self._space(reference)
        keys = list(values)
        written: dict[str, bytes] = {}
        for start in range(0, len(keys), _BATCH):
            batch = keys[start : start + _BATCH]
            encoded = self._codec.encode([values[key] for key in batch], reference.embedding_width)
            async with answering("cache"), self._client.pipeline(transaction=False) as pipe:
                for key, value in zip(batch, encoded, strict=True):
                    pipe.set(_key(space, key), value, px=self._ttl_ms)
                await run(pipe)
            written |= dict(zip(batch, self._codec.decode(encoded, reference.embedding_width), strict=True))
        return written

    async def ping(self) -> None:
        """See the port."""
        async with answering("cache"):
            await self._client.ping()

    async def close(self) -> None:
        """See the port."""
        await self._client.aclose()

    def _space(self, reference: ReferenceInfo) -> str:
        precision = () if self._codec.precision == "float16" else (self._codec.precision,)
        return _space(reference.name, reference.version, reference.preprocessing_id, *precision)


def _space(*names: str) -> str:
    return blake2b("\0".join(names).encode(), digest_size=8).hexdigest()


def _key(space: str, example_key: str) -> str:
    return f"jest:e:{space}:{blake2b(example_key.encode(), digest_size=16).hexdigest()}"
