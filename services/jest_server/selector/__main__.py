"""Wires the selector: `python -m jest_server.selector`, configured by the environment (see settings)."""

from __future__ import annotations

import asyncio
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
from jest_server.selector.decide.decision_inputs import DecisionInputs
from jest_server.selector.decide.decision_maker import DecisionMaker
from jest_server.selector.decide.decision_tasks import DecisionTasks
from jest_server.selector.decide.event_listener import EventListener
from jest_server.selector.decide.scheduler import SelectionScheduler
from jest_server.selector.decide.select_sub_batch import SelectSubBatch
from jest_server.selector.intake.open_attempt import OpenAttempt
from jest_server.selector.intake.quotas import Quotas
from jest_server.selector.intake.submit import SubmitSuperBatch
from jest_server.selector.intake.uploads import UploadExamples
from jest_server.selector.learner_outputs.pending_selections import PendingSelections
from jest_server.selector.learner_outputs.receive import LearnerReceiver
from jest_server.selector.learner_outputs.submitted_rows import SubmittedRows
from jest_server.selector.maintenance import Maintenance
from jest_server.selector.service import JobServicer, SelectionServicer
from jest_server.stores.redis.embedding_cache import RedisEmbeddingCache
from jest_server.stores.redis.stores import open_redis_stores
from jest_server.stores.tiered_cache import with_embedding_files
from jest_server.use_cases.jobs import JobRegistry
from jest_wire import tracing

if TYPE_CHECKING:
    from jest_server.domain.ports import EmbeddingCache, Stores

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in ((selection_pb2, "SelectionService"), (jobs_pb2, "JobService"))
)
_log = logs.get_logger()


async def serve(settings: SelectorSettings, stores: Stores, cache: EmbeddingCache, stop: asyncio.Event) -> None:
    """Run the selector on the given stores and cache until `stop` is set, then drain."""
    registry = CollectorRegistry()
    counts = metrics.SelectorMetrics(registry, max_jobs=settings.metrics_jobs)
    cache = with_embedding_files(cache, settings, counts.embedding_files)
    jobs = JobRegistry(
        stores.jobs, max_world_size=settings.max_world_size, max_jobs_per_tenant=settings.max_jobs_per_tenant
    )
    selections = PendingSelections(max_held_bytes=settings.max_held_bytes, scratch_dir=settings.scratch_dir)
    super_batches, decisions = stores.super_batches, stores.decisions
    quotas = Quotas(super_batches, settings)
    listener = EventListener(super_batches)
    scheduler = SelectionScheduler(settings.compute_threads)
    keep, device = Retention(settings.decision_keep_s, settings.decisions_kept), _device(settings.device)
    inputs = DecisionInputs(super_batches, decisions, cache, listener)
    maker = DecisionMaker(decisions, jobs, inputs, scheduler, counts, device=device, keep=keep)
    tasks = DecisionTasks(selections, maker)
    receiver = LearnerReceiver(SubmittedRows(super_batches, decisions), selections, settings)
    maintenance = Maintenance(stores, cache, selections, counts)
    server = GrpcServer(settings, counts.rpc, max_message_bytes=settings.max_message_bytes)
    selection_pb2_grpc.add_SelectionServiceServicer_to_server(
        SelectionServicer(
            SubmitSuperBatch(super_batches, decisions, cache, jobs, quotas, settings),
            UploadExamples(super_batches, decisions, jobs, quotas, settings, selections.receiving),
            SelectSubBatch(decisions, jobs, receiver, tasks, counts),
            settings,
            server.rates,
        ),
        server.server,
    )
    jobs_pb2_grpc.add_JobServiceServicer_to_server(
        JobServicer(jobs, OpenAttempt(jobs, stores.jobs, decisions, counts)), server.server
    )

    async def watch() -> None:
        try:
            await stores.connection.ping()
            await cache.ping()
        except Exception:
            await server.set_ready(ready=False)
            raise
        await server.set_ready(ready=True)
        await maintenance.observe_work()

    port = await server.start(SERVICES)
    metrics_port = metrics.expose(registry, settings.metrics_listen)
    _log.info("selector listens", port=port, metrics_port=metrics_port, device=str(device))
    async with background(
        listener.listen,
        partial(every, settings.sweep_interval_s, maintenance.dead_letter_stale, name="sweep"),
        partial(every, settings.sweep_interval_s, maintenance.forget_ended_jobs, name="forget ended jobs"),
        partial(every, 1.0, watch, name="watch"),
        partial(every, settings.sweep_interval_s, maintenance.observe_memory, name="watch memory"),
    ):
        await stop.wait()
        _log.info("selector drains")
        await server.drain()
    await tasks.close()
    scheduler.close()
    await stores.connection.close()
    await cache.close()
    _log.info("selector stopped")


def main(settings: SelectorSettings | None = None) -> None:
    """Run the selector on Redis."""
    settings = settings or SelectorSettings()
    logs.configure(process="selector", log_format=settings.log_format, level=settings.log_level)
    if settings.tracing:
        tracing.start("jest-selector")
    tune_for_latency()

    async def run() -> None:
        stores = open_redis_stores(settings.queue_url)
        cache = RedisEmbeddingCache.from_settings(settings)
        await serve(settings, stores, cache, stop_on_signals())

    asyncio.run(run())
    tracing.stop()


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


if __name__ == "__main__":
    main()
