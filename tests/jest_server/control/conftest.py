"""The REST service over the in-memory stores, asked as a client would."""

from __future__ import annotations

import time

import httpx
import pytest
from prometheus_client import CollectorRegistry

from jest_server.control.app import create_app
from jest_server.control.guard import Guard
from jest_server.runtime.metrics import ControlMetrics
from jest_server.runtime.security.rate import CallRates
from jest_server.runtime.settings import ControlSettings
from jest_server.use_cases.jobs import JobRegistry
from support.memory_stores.embedding_cache import MemoryEmbeddingCache
from support.memory_stores.stores import open_memory_stores
from support.super_batches import REFERENCE, spec


class Control:
    """What a test of the service touches."""

    def __init__(self) -> None:
        self.stores = open_memory_stores()
        self.cache = MemoryEmbeddingCache()
        self.registry = CollectorRegistry()
        self.is_stopping = False
        self.jobs = JobRegistry(self.stores.jobs, max_world_size=64)
        self.app = create_app(self.stores, self.cache, self.jobs, stopping=lambda: self.is_stopping)
        self.options = {"rates": CallRates(ControlSettings())}

    def client(self):
        guarded = Guard(self.app, metrics=ControlMetrics(self.registry), **self.options)
        transport = httpx.ASGITransport(guarded, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://control")


@pytest.fixture
async def control():
    control = Control()
    await control.stores.jobs.announce_reference(REFERENCE, ttl_s=60)
    await control.stores.jobs.create_job(spec("job", max_in_flight=2), now_s=time.time())
    return control


@pytest.fixture
async def client(control):
    async with control.client() as client:
        yield client
