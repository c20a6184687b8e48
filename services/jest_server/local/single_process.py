"""Selector and scorer in one process on an in-memory queue and cache: the stand-in where neither Valkey nor Redis runs.

`python -m jest_server.local.single_process`; everything it knows is gone when it ends.
"""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry

from jest_server.reference.from_settings import reference_model
from jest_server.runtime import logs, metrics
from jest_server.runtime.lifecycle import stop_on_signals, tune_for_latency
from jest_server.runtime.settings import ScorerSettings, SelectorSettings
from jest_server.scorer import __main__ as scorer
from jest_server.selector import __main__ as selector
from jest_server.stores.memory.embedding_cache import MemoryEmbeddingCache
from jest_server.stores.memory.stores import open_memory_stores
from jest_wire import tracing

_ANY_PORT = "127.0.0.1:0"


def main() -> None:
    """Runs both until the first SIGTERM or SIGINT."""
    selector_settings = SelectorSettings()
    scorer_settings = ScorerSettings(listen=_ANY_PORT, metrics_listen=_ANY_PORT)
    logs.configure(process="server", log_format=selector_settings.log_format, level=selector_settings.log_level)
    if selector_settings.tracing:
        tracing.start("jest-server")
    tune_for_latency()

    async def run() -> None:
        stop = stop_on_signals()
        stores, cache = open_memory_stores(), MemoryEmbeddingCache(shared=selector_settings.share_cache)
        counts = metrics.ScorerMetrics(CollectorRegistry())
        model = reference_model(scorer_settings, counts)
        async with asyncio.TaskGroup() as group:
            group.create_task(selector.serve(selector_settings, stores, cache, stop))
            group.create_task(scorer.serve(scorer_settings, stores, cache, model, counts, stop))

    asyncio.run(run())
    tracing.stop()


if __name__ == "__main__":
    main()
