"""EmbeddingCache on Redis: one string per example, in a key space per model, version and preprocessing.

Key `jest:e:SPACE:EXAMPLE`, both parts BLAKE2b digests: of model name, version, preprocessing id and, unless it is
float16, precision (8 bytes), and of the example key (16 bytes). Value: see `embedding_codec`. Lives until evicted,
or for `ttl_s`. Key `jest:l:SPACE:EXAMPLE`: the owner of the lease to compute this value. Lives until released,
some seconds at most unless renewed.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from jest_server.domain.chunked import chunked
from jest_server.domain.embedding_codec import CODECS, decoded, encoded
from jest_server.domain.ports import EmbeddingCache
from jest_server.domain.storage import CacheStats, Lease
from jest_server.stores.redis.connection import Script, connect, milliseconds, run, translate_redis_errors
from jest_server.stores.tenant_cache import for_job

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from redis.asyncio import Redis

    from jest_server.domain.embedding_codec import Precision
    from jest_server.domain.references import ReferenceInfo
    from jest_server.runtime.settings import ProcessSettings

_BATCH = 1000


class RedisEmbeddingCache(EmbeddingCache):
    """Reference embeddings in a Redis that may evict them."""

    def __init__(
        self, client: Redis, *, ttl_s: float | None = None, precision: Precision = "float16", shared: bool = True
    ) -> None:
        self._client = client
        self._shared = shared
        self._codec = CODECS[precision]
        self._ttl_ms = None if ttl_s is None else milliseconds(ttl_s)
        self._take = Script(client, "take")
        self._renew = Script(client, "renew")
        self._release_leases = Script(client, "release_leases")

    @classmethod
    def from_url(
        cls, url: str, *, ttl_s: float | None = None, precision: Precision = "float16", shared: bool = True
    ) -> RedisEmbeddingCache:
        """Connect lazily; `shared` tells whether tenants share what they put there."""
        return cls(connect(url), ttl_s=ttl_s, precision=precision, shared=shared)

    @classmethod
    def from_settings(cls, settings: ProcessSettings) -> RedisEmbeddingCache:
        """Connect lazily to the cache that every process of a deployment shares."""
        return cls.from_url(settings.cache_url, precision=settings.cache_precision, shared=settings.share_cache)

    @override
    def for_tenant_of(self, job: str) -> EmbeddingCache:
        return for_job(self, job, shared=self._shared)

    @override
    async def get(self, reference: ReferenceInfo, keys: Sequence[str]) -> list[bytes | None]:
        space = self._space(reference)
        values: list[bytes | None] = []
        for batch in chunked(keys, _BATCH):
            names = [_key(space, key) for key in batch]
            async with translate_redis_errors("cache"):
                held: list[Any] = await self._client.mget(names)
            values += decoded(self._codec, held, reference)
        return values

    @override
    async def put(self, reference: ReferenceInfo, values: Mapping[str, bytes]) -> dict[str, bytes]:
        space, width = self._space(reference), reference.embedding_width
        size = self._codec.value_bytes(width)
        kept: dict[str, bytes] = {}
        for batch in chunked(values, _BATCH):
            fresh = encoded(self._codec, {key: values[key] for key in batch}, reference)
            earlier = dict(zip(batch, await self._set(space, fresh, if_absent=True), strict=True))
            whole = {key: value for key, value in earlier.items() if value is not None and len(value) == size}
            broken = {key: fresh[key] for key, value in earlier.items() if value is not None and key not in whole}
            if broken:
                await self._set(space, broken, if_absent=False)
            kept |= dict(zip(batch, self._codec.decode(list((fresh | whole).values()), width), strict=True))
        return kept

    @override
    async def take(
        self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str, ttl_s: float
    ) -> list[bytes | Lease]:
        space, taken = self._space(reference), []
        size = self._codec.value_bytes(reference.embedding_width)
        for batch in chunked(keys, _BATCH):
            names = [*(_key(space, key) for key in batch), *(_lease(space, key) for key in batch)]
            async with translate_redis_errors("cache"):
                answers: list[Any] = await self._take(*names, owner=owner, ttl_ms=milliseconds(ttl_s), value_bytes=size)
            held = [answer if isinstance(answer, bytes) else None for answer in answers]
            found = decoded(self._codec, held, reference)
            taken += [Lease(a) if value is None else value for a, value in zip(answers, found, strict=True)]
        return taken

    @override
    async def renew(self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str, ttl_s: float) -> None:
        space = self._space(reference)
        for batch in chunked(keys, _BATCH):
            async with translate_redis_errors("cache"):
                await self._renew(*(_lease(space, key) for key in batch), owner=owner, ttl_ms=milliseconds(ttl_s))

    @override
    async def release_leases(self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str) -> None:
        space = self._space(reference)
        for batch in chunked(keys, _BATCH):
            async with translate_redis_errors("cache"):
                await self._release_leases(*(_lease(space, key) for key in batch), owner=owner)

    @override
    async def stats(self) -> CacheStats:
        async with translate_redis_errors("cache"), self._client.pipeline(transaction=False) as pipe:
            pipe.dbsize()
            pipe.info("memory")
            pipe.info("stats")
            values, memory, stats = await run(pipe)
        return CacheStats(
            values=values,
            used_bytes=memory["used_memory"],
            max_bytes=memory["maxmemory"],
            hits=stats["keyspace_hits"],
            misses=stats["keyspace_misses"],
            evicted=stats["evicted_keys"],
        )

    @override
    async def ping(self) -> None:
        async with translate_redis_errors("cache"):
            await self._client.ping()

    @override
    async def close(self) -> None:
        await self._client.aclose()

    async def _set(self, space: str, values: Mapping[str, bytes], *, if_absent: bool) -> list[bytes | None]:
        """Set values, or only those that are not there; returns what was there before."""
        async with translate_redis_errors("cache"), self._client.pipeline(transaction=False) as pipe:
            for key, value in values.items():
                pipe.set(_key(space, key), value, px=self._ttl_ms, nx=if_absent, get=True)
            return await run(pipe)

    def _space(self, reference: ReferenceInfo) -> str:
        precision = () if self._codec.precision == "float16" else (self._codec.precision,)
        return _space(reference.name, reference.version, reference.preprocessing_id, *precision)


def _space(*names: str) -> str:
    return blake2b("\0".join(names).encode(), digest_size=8).hexdigest()


def _key(space: str, example_key: str) -> str:
    return f"jest:e:{space}:{_digest(example_key)}"


def _lease(space: str, example_key: str) -> str:
    return f"jest:l:{space}:{_digest(example_key)}"


def _digest(example_key: str) -> str:
    return blake2b(example_key.encode(), digest_size=16).hexdigest()
