"""The in-memory twin and the real store give the same answers to the same calls, in whatever order they come."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from contextvars import ContextVar

import pytest
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from jest_server.domain.errors import JestServerError
from jest_server.domain.super_batches import Limits, SuperBatchRef
from jest_server.stores.redis.stores import open_redis_stores
from support.memory_stores.stores import open_memory_stores
from support.servers import QUEUE_KINDS, queue_server_of
from support.super_batches import (
    REFERENCE,
    accounts,
    dead_letter,
    decision,
    key_prefix,
    result_of,
    spec,
    submit,
    upload,
)

SERVER_URL: ContextVar[str] = ContextVar("SERVER_URL")
JOBS = strategies.sampled_from(["job-1", "job-2"])
SUPER_BATCHES = strategies.sampled_from(["a", "b", "c", "d"])
CONSUMERS = strategies.sampled_from(["one", "two"])
NOW_S = 1_700_000_000.0


class Twins(RuleBasedStateMachine):
    """Makes every call on both stores and compares what comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.real = open_redis_stores(SERVER_URL.get(), prefix=key_prefix())
        self.twin = open_memory_stores()
        self.claims = []
        self.now_s = NOW_S

    def teardown(self):
        self.runner.run(self.real.connection.close())
        self.runner.close()

    async def outcome(self, call):
        try:
            return await call
        except JestServerError as error:
            return type(error), str(error)

    def both(self, call):
        """Returns what both stores answer."""

        async def run():
            return await self.outcome(call(self.real)), await self.outcome(call(self.twin))

        real, twin = self.runner.run(run())
        assert real == twin
        return real

    def both_claim(self, call):
        """As ``both`` for claims, whose tokens are each store's own."""

        async def run():
            return await call(self.real), await call(self.twin)

        real, twin = self.runner.run(run())
        assert [(c.shard, c.deliveries) for c in real] == [(c.shard, c.deliveries) for c in twin]
        self.claims += zip(real, twin, strict=True)

    def on_claim(self, number, call):
        """Makes a call about an earlier claim, which may be stale."""
        real, twin = self.claims[number % len(self.claims)]

        async def run():
            await call(self.real, real)
            await call(self.twin, twin)

        self.runner.run(run())

    @rule(job=JOBS, seed=strategies.integers(0, 1))
    def create_job(self, job, seed):
        self.both(lambda stores: stores.jobs.create_job(spec(job, seed=seed), now_s=1.0))

    @rule(job=JOBS)
    def delete_job(self, job):
        self.both(lambda stores: stores.jobs.delete_job(job))

    @rule(
        job=JOBS,
        super_batch=SUPER_BATCHES,
        rank=strategies.integers(0, 1),
        world_size=strategies.sampled_from([2, 2, 2, 3]),
        digest=strategies.sampled_from(["d", "d", "e"]),
        ttl_s=strategies.sampled_from([5.0, 50.0]),
    )
    def submit(self, job, super_batch, rank, world_size, digest, ttl_s):
        fields = {"rank": rank, "world_size": world_size, "digest": digest}
        self.both(
            lambda stores: submit(stores, job, super_batch, max_in_flight=3, ttl_s=ttl_s, now_s=self.now_s, **fields)
        )

    @rule(job=JOBS, super_batch=SUPER_BATCHES, shards=strategies.integers(0, 3), digest=strategies.sampled_from("uv"))
    def upload(self, job, super_batch, shards, digest):
        self.both(lambda stores: upload(stores, job, super_batch, shards=shards, digest=digest))

    @rule(consumer=CONSUMERS, count=strategies.integers(1, 4))
    def claim(self, consumer, count):
        self.both_claim(lambda stores: stores.queue.claim(consumer, REFERENCE, count=count, block_s=0))

    @rule(consumer=CONSUMERS, count=strategies.integers(1, 2))
    def reclaim(self, consumer, count):
        self.both_claim(lambda stores: stores.queue.reclaim(consumer, REFERENCE, idle_s=0, count=count))

    @precondition(lambda self: self.claims)
    @rule(number=strategies.integers(0, 99), inferred=strategies.integers(0, 2))
    def complete(self, number, inferred):
        self.on_claim(number, lambda stores, claim: stores.queue.complete(claim, result_of(claim, inferred)))

    @precondition(lambda self: self.claims)
    @rule(number=strategies.integers(0, 99), consumer=CONSUMERS)
    def release(self, number, consumer):
        self.on_claim(number, lambda stores, claim: stores.queue.release(consumer, [claim]))

    @precondition(lambda self: self.claims)
    @rule(number=strategies.integers(0, 99), consumer=CONSUMERS)
    def keep(self, number, consumer):
        self.on_claim(number, lambda stores, claim: stores.queue.heartbeat(consumer, [claim]))

    @rule(job=JOBS, super_batch=SUPER_BATCHES, seed=strategies.integers(0, 1))
    def decide(self, job, super_batch, seed):
        self.both(lambda stores: stores.decisions.decide(decision(job, super_batch, seed=seed), keep_s=600))

    @rule(job=JOBS, super_batch=SUPER_BATCHES)
    def dead_letter(self, job, super_batch):
        self.both(lambda stores: stores.decisions.dead_letter(dead_letter(job, super_batch, at_s=self.now_s)))

    @rule(job=JOBS, super_batch=SUPER_BATCHES)
    def drop_dead_letter(self, job, super_batch):
        self.both(lambda stores: stores.decisions.drop_dead_letter(SuperBatchRef(job, super_batch)))

    @rule(job=JOBS, super_batch=SUPER_BATCHES, most=strategies.integers(0, 2))
    def requeue(self, job, super_batch, most):
        limits = Limits(job=most)
        self.both(
            lambda stores: stores.decisions.requeue(
                SuperBatchRef(job, super_batch), REFERENCE, limits=limits, ttl_s=50.0, now_s=self.now_s
            )
        )

    @rule(seconds=strategies.sampled_from([1.0, 10.0]))
    def time_passes(self, seconds):
        self.now_s += seconds

        async def expired(stores):
            letters = await stores.decisions.dead_letter_overdue(now_s=self.now_s)
            return sorted((found.job, found.super_batch_id) for found in letters)

        self.both(expired)

    @invariant()
    def everything_that_can_be_asked_is_the_same(self):
        async def of_super_batch(stores, job, name):
            results = await stores.super_batches.get_results(SuperBatchRef(job, name))
            return (
                await stores.super_batches.get_super_batch(SuperBatchRef(job, name)),
                await stores.super_batches.row_counts(SuperBatchRef(job, name), range(3)),
                await stores.decisions.get_decision(SuperBatchRef(job, name)),
                await stores.decisions.get_dead_letter(SuperBatchRef(job, name)),
                sorted(results, key=lambda result: result.inferred),
            )

        async def picture(stores):
            names = [(job, name) for job in ("job-1", "job-2") for name in "abcd"]
            return await asyncio.gather(
                stores.queue.depth(),
                stores.queue.queue_states(),
                stores.jobs.list_jobs(after="", limit=10),
                *(accounts(stores, job) for job in ("job-1", "job-2")),
                *(stores.decisions.list_dead_letters(job, limit=10) for job in ("job-1", "job-2")),
                *(of_super_batch(stores, job, name) for job, name in names),
            )

        self.both(picture)


@contextmanager
def server_url(url):
    token = SERVER_URL.set(url)
    try:
        yield
    finally:
        SERVER_URL.reset(token)


@pytest.mark.parametrize("kind", QUEUE_KINDS)
def test_both_stores_answer_alike(kind, tmp_path):
    with queue_server_of(kind, tmp_path) as server, server_url(f"{server.url}/0"):
        run_state_machine_as_test(
            Twins,
            settings=settings(
                max_examples=10,
                stateful_step_count=30,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            ),
        )
