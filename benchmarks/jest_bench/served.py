"""A selector to measure: a process of its own on loopback, with reference embeddings in its cache and no scorer.

What a scorer would leave behind is put there beforehand, through the adapters that a scorer uses: a call to
SelectSubBatch then waits for nothing but itself.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jest_server.local.jest_process import JestProcess
from jest_server.local.process import LOOPBACK, ServerStartError
from jest_server.local.valkey_server import ValkeyServer, executables
from jest_server.stores.redis.embedding_cache import RedisEmbeddingCache
from jest_server.stores.redis.stores import open_redis_stores

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from jest_server.domain.ports import EmbeddingCache, JobStore
    from jest_server.domain.references import ReferenceInfo

ANNOUNCED_FOR_S = 86400.0


@dataclass(frozen=True)
class Served:
    """Where a selector listens, and what it stands on, in words."""

    address: str
    stands_on: str


@contextmanager
def selector(reference: ReferenceInfo, embeddings: Mapping[str, bytes]) -> Iterator[Served]:
    """Run a selector that serves the reference model and has its embeddings, by example key, ``[2, D]`` f16 bytes.

    Queue and cache are a Valkey or Redis of their own.

    Raises:
        ServerStartError: If a process does not come up.
    """
    problem = ValkeyServer.available()
    if problem is not None:
        raise ServerStartError(problem)
    folder = Path(tempfile.mkdtemp(prefix="jest-bench-"))
    name, executable = next(iter(executables().items()))
    valkey = ValkeyServer(folder / "valkey", executable=executable, append_only=False)
    valkey.start()
    urls = {"queue_url": f"{valkey.url}/0", "cache_url": f"{valkey.url}/1"}

    async def prepare() -> None:
        stores = open_redis_stores(urls["queue_url"])
        cache = RedisEmbeddingCache.from_url(urls["cache_url"])
        await _prepare(stores.jobs, cache, reference, embeddings)
        await stores.connection.close()
        await cache.close()

    try:
        asyncio.run(prepare())
        process = JestProcess("selector", "jest_server.selector", folder / "selector.log", {**urls, "drain_delay_s": 0})
        process.start()
        try:
            yield Served(f"{LOOPBACK}:{process.port}", f"queue and cache in {name.capitalize()}")
        finally:
            process.stop()
    finally:
        valkey.stop()
        shutil.rmtree(folder, ignore_errors=True)


async def _prepare(
    jobs: JobStore, cache: EmbeddingCache, reference: ReferenceInfo, embeddings: Mapping[str, bytes]
) -> None:
    await jobs.announce_reference(reference, ttl_s=ANNOUNCED_FOR_S)
    await cache.put(reference, embeddings)
