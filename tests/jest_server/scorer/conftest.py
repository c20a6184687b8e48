"""A scorer's worker between a real queue and a reference model that does as it is told."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from contextlib import asynccontextmanager

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from jest_server.domain.errors import ReferenceModelError
from jest_server.domain.jobs import JobSpec
from jest_server.domain.policies import PolicySpec
from jest_server.domain.references import ReferenceInfo, ReferenceInput
from jest_server.domain.shards import Shard
from jest_server.domain.super_batches import Limits, Submission, SuperBatchRef
from jest_server.runtime.metrics import ScorerMetrics
from jest_server.runtime.settings import ScorerSettings
from jest_server.scorer.worker import Worker
from jest_server.stores import blobs
from jest_server.stores.redis.embedding_cache import RedisEmbeddingCache
from jest_server.stores.redis.stores import open_redis_stores

WIDTH = 4


class ObedientModel:
    """Embeds x to [[x, 0, 0, 0], [0, x, 0, 0]]; fails, hangs or is away on demand."""

    def __init__(self) -> None:
        self.version = uuid.uuid4().hex
        self.embedded: list[int] = []
        self.is_ready = True
        self.weights = np.eye(2, WIDTH, dtype=np.float32)
        self.errors: list[ReferenceModelError] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def info(self):
        inputs = (ReferenceInput(name="x", datatype="INT64", shape=()),)
        return ReferenceInfo(
            name="ref",
            version=self.version,
            preprocessing_id="p",
            scale=1.0,
            bias=0.0,
            embedding_width=WIDTH,
            inputs=inputs,
        )

    async def fingerprint(self, reference):
        assert reference.version == self.version
        return self.weights[None, :, :]

    async def ready(self):
        return self.is_ready

    async def embed(self, inputs):
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        if not self.is_ready:
            raise ReferenceModelError("away", retryable=True)
        self.embedded += inputs["x"].tolist()
        out = np.zeros((len(inputs["x"]), 2, WIDTH), np.float32)
        out[:, 0, 0] = out[:, 1, 1] = inputs["x"]
        return out

    async def close(self):
        pass


class Bench:
    """Everything a test of the worker touches."""

    def __init__(self, url: str) -> None:
        self.stores = open_redis_stores(f"{url}/0")
        self.cache = RedisEmbeddingCache.from_url(f"{url}/1")
        self.model = ObedientModel()
        self.job = f"job-{uuid.uuid4().hex[:8]}"
        self._ids = itertools.count()

    async def queue(self, keys, *, version=None, features=None, values=None, traceparent=""):
        """Puts a super-batch of one shard in flight and returns its id."""
        info = await self.model.info()
        await self.stores.jobs.create_job(
            JobSpec(name=self.job, reference_model="ref", policy=PolicySpec(sub_batch_size=16)), now_s=time.time()
        )
        super_batch_id = f"sb-{next(self._ids)}"
        submission = Submission(
            job=self.job,
            super_batch_id=super_batch_id,
            rank=0,
            world_size=1,
            step=0,
            reference=info,
            keys=tuple(keys),
            digest="d",
        )
        await self.stores.super_batches.submit(submission, limits=Limits(), ttl_s=60, now_s=time.time())
        array = np.array(values if values is not None else range(len(keys)), np.int64)
        packed = blobs.pack({"tensors": [{"name": "x", "datatype": "INT64", "shape": array.shape}]}, array.data)
        shard = Shard(
            shard_id="0-u-0",
            job=self.job,
            super_batch_id=super_batch_id,
            reference_model="ref",
            reference_version=version or info.version,
            keys=tuple(keys),
            features=packed if features is None else features,
            traceparent=traceparent,
        )
        positions = tuple(range(len(keys)))
        await self.stores.super_batches.add_upload(
            SuperBatchRef(self.job, super_batch_id), 0, digest="u", positions=positions, shards=[shard], limits=Limits()
        )
        return super_batch_id

    async def scored(self, super_batch_id):
        """Waits for the result of the super-batch's shard."""
        return (await until(lambda: self.stores.super_batches.get_results(SuperBatchRef(self.job, super_batch_id))))[0]

    async def dead(self, super_batch_id):
        """Waits for the super-batch's dead letter."""
        return await until(lambda: self.stores.decisions.get_dead_letter(SuperBatchRef(self.job, super_batch_id)))

    @asynccontextmanager
    async def working(self, sources=None, **settings):
        """Runs a worker for the length of the block."""
        defaults = {"consumer": uuid.uuid4().hex, "reclaim_idle_s": 0.3, "grace_s": 0.2}
        worker = Worker(
            self.stores.jobs,
            self.stores.queue,
            self.stores.decisions,
            self.cache,
            self.model,
            ScorerSettings(**defaults | settings),
            ScorerMetrics(CollectorRegistry()),
            sources,
        )
        await worker.watch_reference()
        stop = asyncio.Event()

        async def repeat():
            while not stop.is_set():
                await worker.watch_reference()
                await worker.heartbeat_claims()
                await worker.reclaim_stale()
                await asyncio.sleep(0.05)

        chores, running = asyncio.create_task(repeat()), asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            stop.set()
            running.cancel()
            await asyncio.gather(chores, running, return_exceptions=True)
            await worker.drain()


async def until(look, *, timeout_s: float = 30.0):
    """Polls until the coroutine function returns something true."""
    async with asyncio.timeout(timeout_s):
        while not (found := await look()):
            await asyncio.sleep(0.01)
    return found


@pytest.fixture
async def bench(queue_server):
    bench = Bench(queue_server)
    yield bench
    await bench.stores.jobs.delete_job(bench.job)
    await bench.stores.connection.close()
    await bench.cache.close()
