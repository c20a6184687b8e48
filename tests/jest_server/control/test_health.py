"""The health port of the REST service, for probes that speak gRPC and no TLS."""

from __future__ import annotations

import asyncio
import dataclasses

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jest_server.control.__main__ import SERVICE, serve
from jest_server.domain.errors import StoreUnavailable
from jest_server.local.process import free_port
from jest_server.runtime.health import LIVENESS
from jest_server.runtime.settings import ControlSettings
from support.memory_stores.embedding_cache import MemoryEmbeddingCache
from support.memory_stores.state import MemoryState
from support.memory_stores.stores import open_memory_stores
from support.polling import wait_for

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class MovableServer(MemoryState):
    """Can be out of reach."""

    away = False

    async def ping(self):
        if self.away:
            raise StoreUnavailable("the queue does not answer")


@pytest.fixture
async def server():
    """The server behind the stores of a service that runs until the test ends."""
    return MovableServer()


@pytest.fixture
async def ask(server):
    port, stop = free_port(), asyncio.Event()
    settings = ControlSettings(
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        health_listen=f"127.0.0.1:{port}",
        drain_delay_s=0,
    )
    stores = dataclasses.replace(open_memory_stores(), connection=server)
    running = asyncio.create_task(serve(settings, stores, MemoryEmbeddingCache(), stop))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def ask(service):
            request = health_pb2.HealthCheckRequest(service=service)
            return (await stub.Check(request, timeout=5, wait_for_ready=True)).status

        yield ask
    stop.set()
    await running


async def test_control_tells_probes_that_it_can_answer(ask):
    async def ready():
        return [await ask(service) for service in ("", SERVICE, LIVENESS)] == [SERVING] * 3

    await wait_for(ready)


async def test_a_store_that_is_away_makes_control_unready_and_leaves_it_alive(ask, server):
    async def ready():
        return await ask("") == SERVING

    async def unready():
        return await ask("") == NOT_SERVING

    await wait_for(ready)
    server.away = True
    await wait_for(unready)
    assert await ask(LIVENESS) == SERVING
    server.away = False
    await wait_for(ready)
