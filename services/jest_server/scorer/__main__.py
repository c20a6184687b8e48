"""Wires the scorer: `python -m jest_server.scorer`, configured by the environment (see settings)."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from jest_server.domain.sources import AllowedSources
from jest_server.reference.from_settings import reference_model
from jest_server.runtime import logs, metrics
from jest_server.runtime.grpc_server import GrpcServer
from jest_server.runtime.lifecycle import background, every, stop_on_signals
from jest_server.runtime.settings import ScorerSettings
from jest_server.scorer.worker import Worker
from jest_server.stores.redis.embedding_cache import RedisEmbeddingCache
from jest_server.stores.redis.stores import open_redis_stores
from jest_server.stores.tiered_cache import with_embedding_files
from jest_wire import tracing

if TYPE_CHECKING:
    from jest_server.domain.ports import EmbeddingCache, ExampleSources, ReferenceModel, Stores

SERVICE = "jest.scorer"
"""The scorer serves no calls; this is the name under which it answers health checks."""
LONGEST_ABSENCE_S = 1.0
"""How long at most before a reference model that was away is looked for again."""
_log = logs.get_logger()


async def serve(
    settings: ScorerSettings,
    stores: Stores,
    cache: EmbeddingCache,
    model: ReferenceModel,
    counts: metrics.ScorerMetrics,
    stop: asyncio.Event,
) -> None:
    """Run the scorer on the given stores, cache and model until `stop` is set, then drains."""
    cache = with_embedding_files(cache, settings, counts.embedding_files)
    ports = stores.jobs, stores.queue, stores.decisions
    worker = Worker(*ports, cache, model, settings, counts, example_sources(settings))
    server = GrpcServer(settings, counts.rpc)

    async def watch() -> None:
        await worker.watch_reference()
        await server.set_ready(ready=worker.ready)

    def until_next_watch_s() -> float:
        interval_s = settings.announce_interval_s
        return interval_s if worker.ready else min(interval_s, LONGEST_ABSENCE_S)

    port = await server.start((SERVICE,))
    _log.info("scorer listens", port=port, consumer=settings.consumer)
    async with background(
        partial(every, until_next_watch_s, watch, name="watch reference"),
        partial(every, settings.fingerprint_interval_s, worker.check_fingerprint, name="check fingerprint"),
        partial(every, settings.reclaim_idle_s / 4, worker.heartbeat_claims, name="heartbeat claims"),
        partial(every, settings.reclaim_idle_s / 4, worker.reclaim_stale, name="reclaim stale"),
        worker.run,
    ):
        await stop.wait()
    _log.info("scorer drains")
    await asyncio.gather(server.drain(), worker.drain())
    await model.close()
    await stores.connection.close()
    await cache.close()
    _log.info("scorer stopped")


def main(settings: ScorerSettings | None = None) -> None:
    """Run the scorer on Redis and the configured reference backend."""
    settings = settings or ScorerSettings()
    logs.configure(process="scorer", log_format=settings.log_format, level=settings.log_level)
    if settings.tracing:
        tracing.start("jest-scorer")
    registry = CollectorRegistry()
    counts = metrics.ScorerMetrics(registry)
    metrics.expose(registry, settings.metrics_listen)

    async def run() -> None:
        stores = open_redis_stores(settings.queue_url)
        cache = RedisEmbeddingCache.from_settings(settings)
        await serve(settings, stores, cache, reference_model(settings, counts), counts, stop_on_signals())

    asyncio.run(run())
    tracing.stop()


def example_sources(settings: ScorerSettings) -> ExampleSources | None:
    """Make what reads examples by reference, if the settings let it.

    Raises:
        ValueError: If a setting is invalid.
    """
    if not settings.source_prefixes:
        return None
    if not settings.preprocess:
        raise ValueError("JEST_PREPROCESS is not set, expected MODULE:FUNCTION: JEST_SOURCE_PREFIXES is")
    from jest_server.examples.options import EmbedOptions  # noqa: PLC0415 - ... nor pictures
    from jest_server.examples.source_reader import SourceReader  # noqa: PLC0415 - most scorers need neither fsspec ...

    options = EmbedOptions(
        data="-",
        output="-",
        preprocess=settings.preprocess,
        caption=settings.caption,
        max_member_bytes=settings.max_source_bytes,
    )
    return SourceReader(AllowedSources(settings.source_prefixes), options)


if __name__ == "__main__":
    main()
