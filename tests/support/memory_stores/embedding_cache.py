"""EmbeddingCache in this process's memory, bounded: the least recently used embeddings go first."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from typing_extensions import override

from jest_server.domain.chunked import chunked
from jest_server.domain.embedding_codec import CODECS, decoded, encoded
from jest_server.domain.ports import EmbeddingCache
from jest_server.domain.storage import CacheStats, Lease
from jest_server.stores.tenant_cache import for_job

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_server.domain.embedding_codec import Precision
    from jest_server.domain.references import ReferenceInfo

_BATCH = 1000
DEFAULT_MAX_BYTES = 1 << 30

Key = tuple[str, str, str, str]


class MemoryEmbeddingCache(EmbeddingCache):
    """Reference embeddings in a dictionary of at most `max_bytes` of values."""

    def __init__(
        self, *, max_bytes: int = DEFAULT_MAX_BYTES, precision: Precision = "float16", shared: bool = True
    ) -> None:
        self._shared = shared
        self._max_bytes = max_bytes
        self._codec = CODECS[precision]
        self._held_bytes = 0
        self._values: OrderedDict[Key, bytes] = OrderedDict()
        self._leases: dict[Key, tuple[str, float]] = {}
        self._hits = self._misses = self._evicted = 0

    @override
    def for_tenant_of(self, job: str) -> EmbeddingCache:
        return for_job(self, job, shared=self._shared)

    @override
    async def get(self, reference: ReferenceInfo, keys: Sequence[str]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for batch in chunked(keys, _BATCH):
            held = [self._touched(_key(reference, key)) for key in batch]
            found += decoded(self._codec, held, reference)
            await asyncio.sleep(0)  # other tasks of this event loop should not wait for all of them
        return found

    @override
    async def put(self, reference: ReferenceInfo, values: Mapping[str, bytes]) -> dict[str, bytes]:
        width = reference.embedding_width
        kept = []
        for key, value in encoded(self._codec, values, reference).items():
            held = self._values.pop(_key(reference, key), b"")
            kept.append(held if len(held) == len(value) else value)
            self._values[_key(reference, key)] = kept[-1]
            self._held_bytes += len(kept[-1]) - len(held)
        while self._held_bytes > self._max_bytes:
            _, evicted = self._values.popitem(last=False)
            self._held_bytes -= len(evicted)
            self._evicted += 1
        return dict(zip(values, self._codec.decode(kept, width), strict=True))

    @override
    async def take(
        self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str, ttl_s: float
    ) -> list[bytes | Lease]:
        taken: list[bytes | Lease] = []
        for batch in chunked(keys, _BATCH):
            names = [_key(reference, key) for key in batch]
            found = decoded(self._codec, [self._touched(name) for name in names], reference)
            taken += [
                self._leased(name, owner, ttl_s) if value is None else value
                for name, value in zip(names, found, strict=True)
            ]
            await asyncio.sleep(0)
        return taken

    @override
    async def renew(self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str, ttl_s: float) -> None:
        for name in self._held(reference, keys, owner):
            self._leases[name] = owner, time.monotonic() + ttl_s

    @override
    async def release_leases(self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str) -> None:
        for name in self._held(reference, keys, owner):
            del self._leases[name]

    @override
    async def stats(self) -> CacheStats:
        return CacheStats(
            values=len(self._values) + len(self._leases),
            used_bytes=self._held_bytes,
            max_bytes=self._max_bytes,
            hits=self._hits,
            misses=self._misses,
            evicted=self._evicted,
        )

    @override
    async def ping(self) -> None:
        return

    @override
    async def close(self) -> None:
        return

    def _leased(self, name: Key, owner: str, ttl_s: float) -> Lease:
        holder, until = self._leases.get(name, (owner, 0.0))
        if holder != owner and until > time.monotonic():
            return Lease.OTHERS
        self._leases[name] = owner, time.monotonic() + ttl_s
        return Lease.MINE

    def _held(self, reference: ReferenceInfo, keys: Sequence[str], owner: str) -> list[Key]:
        names = [_key(reference, key) for key in keys]
        return [name for name in names if self._leases.get(name, ("", 0.0))[0] == owner]

    def _touched(self, key: Key) -> bytes | None:
        value = self._values.get(key)
        if value is None:
            self._misses += 1
        else:
            self._hits += 1
            self._values.move_to_end(key)
        return value


def _key(reference: ReferenceInfo, key: str) -> Key:
    return reference.name, reference.version, reference.preprocessing_id, key
