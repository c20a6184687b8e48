"""A scorer whose reference model is away when it starts."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry

from jest_server.runtime.metrics import ScorerMetrics
from jest_server.runtime.settings import ScorerSettings
from jest_server.scorer.__main__ import serve


async def test_a_model_that_comes_late_is_found_soon_however_seldom_it_is_announced(bench):
    bench.model.is_ready = False
    settings = ScorerSettings(
        consumer="late", announce_interval_s=3600, listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", drain_delay_s=0
    )
    stop = asyncio.Event()
    counts = ScorerMetrics(CollectorRegistry())
    running = asyncio.create_task(serve(settings, bench.stores, bench.cache, bench.model, counts, stop))
    try:
        await asyncio.sleep(0.2)  # it has looked, and found nothing
        bench.model.is_ready = True
        super_batch = await bench.queue(["a", "b"])
        async with asyncio.timeout(30):
            await bench.scored(super_batch)
    finally:
        stop.set()
        await running
