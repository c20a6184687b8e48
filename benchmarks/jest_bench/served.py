"""A selector to measure: a process of its own on loopback, with reference embeddings in its cache and no scorer.

What a scorer would leave behind is put there beforehand, through the adapters that a scorer uses: a call to
SelectSubBatch then waits for nothing but itself.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jest_server.local.jest_process import JestProcess
from jest_server.local.process import LOOPBACK, ServerStartError, free_port
from jest_server.local.valkey_server import ValkeyServer, executables
from jest_server.runtime import logs
from jest_server.runtime.lifecycle import stop_on_signals
from jest_server.runtime.settings import SelectorSettings
from jest_server.selector.__main__ import serve
from jest_server.stores.memory.embedding_cache import MemoryEmbeddingCache
from jest_server.stores.memory.stores import open_memory_stores
from jest_server.stores.redis.embedding_cache import RedisEmbeddingCache
from jest_server.stores.redis.stores import open_redis_stores

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from jest_server.domain.ports import EmbeddingCache, JobStore
    from jest_server.domain.references import ReferenceInfo

ANNOUNCED_FOR_S = 86400.0
START_TIMEOUT_S = 60.0
STOP_GRACE_S = 20.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Served:
    """Where a selector listens, and what it stands on, in words."""

    address: str
    stands_on: str


@contextmanager
def selector(reference: ReferenceInfo, embeddings: Mapping[str, bytes]) -> Iterator[Served]:
    """Runs a selector that serves the reference model and has its embeddings, by example key, ``[2, D]`` f16 bytes.

    Queue and cache are a Valkey or Redis of their own; where neither is installed, they are in the selector's memory.

    Raises:
        ServerStartError: If a process does not come up.
    """
    run = _on_valkey if ValkeyServer.available() is None else _in_memory
    with run(reference, embeddings) as served:
        yield served


@contextmanager
def _on_valkey(reference: ReferenceInfo, embeddings: Mapping[str, bytes]) -> Iterator[Served]:
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


@contextmanager
def _in_memory(reference: ReferenceInfo, embeddings: Mapping[str, bytes]) -> Iterator[Served]:
    port = free_port()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve_in_memory, args=(port, reference, dict(embeddings)), daemon=True)
    process.start()
    try:
        address = f"{LOOPBACK}:{port}"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _serves(address):
            if not process.is_alive() or time.monotonic() > deadline:
                raise ServerStartError(f"the selector does not serve on {address} (exit code {process.exitcode})")
            time.sleep(_POLL_S)
        yield Served(address, f"queue and cache in its memory, because {ValkeyServer.available()}")
    finally:
        process.terminate()
        process.join(STOP_GRACE_S)
        process.kill()
        process.join()


def _serve_in_memory(port: int, reference: ReferenceInfo, embeddings: Mapping[str, bytes]) -> None:
    """Is the selector's process."""
    logs.configure(process="selector", log_format="json", level="warning")

    async def run() -> None:
        stores, cache = open_memory_stores(), MemoryEmbeddingCache()
        await _prepare(stores.jobs, cache, reference, embeddings)
        settings = SelectorSettings(listen=f"{LOOPBACK}:{port}", metrics_listen=f"{LOOPBACK}:0", drain_delay_s=0)
        await serve(settings, stores, cache, stop_on_signals())

    asyncio.run(run())


async def _prepare(
    jobs: JobStore, cache: EmbeddingCache, reference: ReferenceInfo, embeddings: Mapping[str, bytes]
) -> None:
    await jobs.announce_reference(reference, ttl_s=ANNOUNCED_FOR_S)
    await cache.put(reference, embeddings)


def _serves(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1.0)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
