"""Wires the selector: `python -m jest_server.selector`, configured by the environment (see settings)."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from prometheus_client import CollectorRegistry

from jest_proto.v1 import jobs_pb2, jobs_pb2_grpc, selection_pb2, selection_pb2_grpc
from jest_server.domain.decisions import Retention
from jest_server.runtime import logs, metrics
from jest_server.runtime.grpc_server import GrpcServer
from jest_server.runtime.lifecycle import background, every, stop_on_signals, tune_for_latency
from jest_server.runtime.settings import SelectorSettings
from jest_server.selector.decide.decision_maker import Decider
from jest_server.selector.decide.scheduler import SelectionScheduler
from jest_server.selector.decide.select import Selections
from jest_server.selector.intake.submit import Submissions
from jest_server.selector.learner_outputs.pending import Assemblies
from jest_server.selector.service import JobServicer, SelectionServicer
from jest_server.stores.redis.embedding_cache import RedisEmbeddingCache
from jest_server.stores.redis.super_batches import RedisSuperBatchStore
from jest_server.stores.tiered_cache import with_embedding_files
from jest_server.use_cases.jobs import Jobs
from jest_wire import tracing

if TYPE_CHECKING:
    from jest_server.domain.ports import EmbeddingCache, SuperBatchStore

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in ((selection_pb2, "SelectionService"), (jobs_pb2, "JobService"))
)
_log = logs.get_logger()


async def serve(settings: SelectorSettings, store: SuperBatchStore, cache: EmbeddingCache, stop: asyncio.Event) -> None:
    """Runs the selector on the given store and cache until ``stop`` is set, then drains."""
    registry = CollectorRegistry()
    counts = metrics.SelectorMetrics(registry, max_jobs=settings.metrics_jobs)
    cache = with_embedding_files(cache, settings, counts.embedding_files)
    assemblies = Assemblies(max_held_bytes=settings.max_held_bytes, scratch_dir=settings.scratch_dir)
    jobs = Jobs(store, max_world_size=settings.max_world_size, max_jobs_per_tenant=settings.max_jobs_per_tenant)
    scheduler = SelectionScheduler(settings.compute_threads)
    keep = Retention(settings.decision_keep_s, settings.decisions_kept)
    decider = Decider(store, cache, jobs, scheduler, counts, device=_device(settings.device), keep=keep)
    selections = Selections(store, jobs, assemblies, decider, counts)
    server = GrpcServer(settings, counts.rpc, max_message_bytes=settings.max_message_bytes)
    submissions = Submissions(store, cache, jobs, settings)
    selection_pb2_grpc.add_SelectionServiceServicer_to_server(
        SelectionServicer(submissions, selections, assemblies, settings, server.rates), server.server
    )
    jobs_pb2_grpc.add_JobServiceServicer_to_server(JobServicer(jobs), server.server)

    async def watch() -> None:
        try:
            await store.ping()
            await cache.ping()
        except Exception:
            await server.set_ready(ready=False)
            raise
        await server.set_ready(ready=True)
        counts.queue_depth.set(await store.queue_depth())
        counts.queue_age.set(await store.oldest_queued_age_s(now_s=time.time()))
        counts.assemblies.set(len(assemblies))
        counts.held_bytes.set(assemblies.held_bytes)

    async def watch_memory() -> None:
        counts.observe_memory(await store.memory(), await cache.stats())

    port = await server.start(SERVICES)
    metrics_port = metrics.expose(registry, settings.metrics_listen)
    _log.info("selector listens", port=port, metrics_port=metrics_port, device=str(_device(settings.device)))
    async with background(
        decider.listen,
        partial(every, settings.sweep_interval_s, selections.sweep, name="sweep"),
        partial(every, settings.sweep_interval_s, selections.forget_ended_jobs, name="forget ended jobs"),
        partial(every, 1.0, watch, name="watch"),
        partial(every, settings.sweep_interval_s, watch_memory, name="watch memory"),
    ):
        await stop.wait()
        _log.info("selector drains")
        await server.drain()
    await selections.close()
    scheduler.close()
    await store.close()
    await cache.close()
    _log.info("selector stopped")


def main(settings: SelectorSettings | None = None) -> None:
    """Runs the selector on Redis."""
    settings = settings or SelectorSettings()
    logs.configure(process="selector", log_format=settings.log_format, level=settings.log_level)
    if settings.tracing:
        tracing.start("jest-selector")
    tune_for_latency()

    async def run() -> None:
        store = RedisSuperBatchStore.from_url(settings.queue_url)
        cache = RedisEmbeddingCache.from_settings(settings)
        await serve(settings, store, cache, stop_on_signals())

    asyncio.run(run())
    tracing.stop()


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


if __name__ == "__main__":
    main()
