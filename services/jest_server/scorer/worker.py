"""The scorer's loop: claim shards, score some at a time, reclaim those of dead scorers, release the rest at the end.

The reference model being away is not the shards' fault: the worker holds what it has and claims nothing until a real
inference works again. Only super-batches whose shard fails while the model works for others are dead-lettered.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from jest_server.domain.dead_letters import DeadLetter
from jest_server.domain.errors import ReferenceModelError, StoreUnavailable
from jest_server.runtime.logs import bound, get_logger
from jest_server.scorer.fingerprint import FingerprintCheck, FingerprintMismatch
from jest_server.scorer.scoring import Scoring, UnscorableShard
from jest_wire import tracing

if TYPE_CHECKING:
    from collections.abc import Callable

    from jest_server.domain.ports import (
        DecisionLog,
        EmbeddingCache,
        ExampleSources,
        JobStore,
        ReferenceModel,
        ShardQueue,
    )
    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.shards import Claim
    from jest_server.runtime.metrics import ScorerMetrics
    from jest_server.runtime.settings import ScorerSettings

CLAIM_BLOCK_S = 1.0
READY_POLL_S = 0.25
STORE_RETRY_S = 0.5
ANNOUNCE_LIVES = 4
"""An announcement outlives so many intervals without a successor."""
WAITING_PER_SLOT = 8
"""Shards in hand, for each that may be embedded at the same time: the others wait for embeddings in others' hands."""

_log = get_logger()


class Worker:
    """Own the claims of one scorer process."""

    def __init__(
        self,
        jobs: JobStore,
        queue: ShardQueue,
        decisions: DecisionLog,
        cache: EmbeddingCache,
        model: ReferenceModel,
        settings: ScorerSettings,
        metrics: ScorerMetrics,
        sources: ExampleSources | None = None,
    ) -> None:
        self._jobs = jobs
        self._queue = queue
        self._decisions = decisions
        self._cache = cache
        self._model = model
        self._settings = settings
        self._metrics = metrics
        self._sources = sources
        self._in_hand: dict[str, Claim] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(settings.concurrent_shards)
        self._room = asyncio.Semaphore(WAITING_PER_SLOT * settings.concurrent_shards)
        self._ready = asyncio.Event()
        self._scoring: Scoring | None = None
        self._fingerprint = FingerprintCheck(jobs, model, metrics, min_cosine=settings.fingerprint_min_cosine)

    @property
    def ready(self) -> bool:
        """True while the reference model answered its last probe."""
        return self._ready.is_set()

    async def watch_reference(self) -> None:
        """Probe the model by a real inference, read its configuration and announce it, once.

        A model that was away, or is another one, is compared with the fingerprint of its version first.
        """
        try:
            reference = await self._model.info() if await self._model.ready() else None
            if reference is not None and not self._verified(reference):
                await self._fingerprint.verify(reference)
        except FingerprintMismatch:  # logged once
            reference = None
        except ReferenceModelError as error:
            _log.warning("reference model cannot be used", error=str(error))
            reference = None
        if reference is None:
            if self._ready.is_set() or self._scoring is None:
                _log.warning("reference model is not ready")
            self._withdraw()
            return
        if self._scoring is None or self._scoring.reference != reference:
            _log.info("reference model is ready", model=reference.name, version=reference.version)
            self._scoring = Scoring(
                self._cache,
                self._model,
                reference,
                self._settings.inference_lease_s,
                self._sources,
                self._metrics.extra_passes.inc,
            )
        await self._jobs.announce_reference(reference, ttl_s=ANNOUNCE_LIVES * self._settings.announce_interval_s)
        self._metrics.reference_ready.set(1)
        self._ready.set()

    async def check_fingerprint(self) -> None:
        """Compare the model with the fingerprint of its version while it works; withdraw it if it is another."""
        if self._scoring is None or not self.ready:
            return
        try:
            await self._fingerprint.verify(self._scoring.reference)
        except FingerprintMismatch:
            self._withdraw()
        except ReferenceModelError as error:  # whether the model works at all is for `watch_reference` to find out
            _log.warning("reference model's fingerprint was not taken", error=str(error))

    def _verified(self, reference: ReferenceInfo) -> bool:
        return self.ready and self._scoring is not None and self._scoring.reference == reference

    def _withdraw(self) -> None:
        """Claim and announce nothing until the model is found to be ready again."""
        self._ready.clear()
        self._metrics.reference_ready.set(0)

    async def reclaim_stale(self) -> None:
        """Reclaim shards whose scorer sent no heartbeat; dead-letter those that outlived too many scorers."""
        if self._scoring is None or not self.ready or self._slots.locked() or self._room.locked():
            return
        claims = await self._queue.reclaim(
            self._settings.consumer, self._scoring.reference, idle_s=self._settings.reclaim_idle_s, count=1
        )
        for claim in claims:
            self._metrics.reclaimed.inc()
            _log.warning("shard reclaimed", shard=claim.shard.shard_id, deliveries=claim.deliveries)
            self._trace_wait(claim)
            if claim.deliveries > self._settings.max_deliveries:
                await self._dead_letter(
                    claim, "TOO_MANY_DELIVERIES", f"{claim.deliveries - 1} scorers did not finish it"
                )
            else:
                await self._acquire()
                self._begin(claim)

    async def heartbeat_claims(self) -> None:
        """Send a heartbeat for every claim in hand."""
        if self._in_hand:
            await self._queue.heartbeat(self._settings.consumer, list(self._in_hand.values()))

    async def run(self) -> None:
        """Claim and score, without end."""
        while True:
            await self._ready.wait()
            await self._acquire()
            claims: list[Claim] = []
            try:
                assert self._scoring is not None, "who is ready has a model"
                claims = await self._queue.claim(
                    self._settings.consumer, self._scoring.reference, count=1, block_s=CLAIM_BLOCK_S
                )
            except StoreUnavailable as error:
                _log.warning("queue does not answer", error=str(error))
                await asyncio.sleep(STORE_RETRY_S)
            finally:
                if not claims:
                    self._slots.release()
                    self._room.release()
            for claim in claims:
                self._trace_wait(claim)
                self._begin(claim)

    async def drain(self) -> None:
        """Finish what is in hand within the grace period and release the rest."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._settings.grace_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        left = list(self._in_hand.values())
        if left:
            await self._queue.release(self._settings.consumer, left)
            _log.info("shards released", count=len(left))

    async def _acquire(self) -> None:
        """Wait for room for one more shard and a slot to embed it."""
        await self._room.acquire()
        try:
            await self._slots.acquire()
        except asyncio.CancelledError:
            self._room.release()
            raise

    def _begin(self, claim: Claim) -> None:
        """Start on a claim; the caller has acquired room and a slot for it."""
        self._in_hand[claim.shard.name] = claim
        self._metrics.in_hand.set(len(self._in_hand))
        task = asyncio.create_task(self._work(claim))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _trace_wait(self, claim: Claim) -> None:
        """Put the time that it was queued into its trace, now that this scorer has it."""
        parent = claim.shard.traceparent
        if not parent:  # who queued it records no spans: it would be a trace of its own
            return
        with tracing.span("scorer.queue", parent=parent, kind="consumer", since_s=claim.queued_at_s) as span:
            if span is not None:
                span.set_attributes(self._attributes(claim))

    async def _work(self, claim: Claim) -> None:
        started = time.monotonic()
        slot = ExitStack()
        slot.callback(self._slots.release)
        with bound(job=claim.shard.job, super_batch=claim.shard.super_batch_id, shard=claim.shard.shard_id):
            try:
                try:
                    await self._score(claim, on_wait=slot.close)
                    self._metrics.shard_duration.observe(time.monotonic() - started)
                except UnscorableShard as error:
                    await self._dead_letter(claim, error.reason, str(error))
            except asyncio.CancelledError:
                raise  # still in hand: drain releases it
            except Exception:  # noqa: BLE001 - a fault of ours must not stop the scorer
                # No more heartbeats for this claim: it is reclaimed, and dead-lettered if that happens too often.
                _log.exception("shard failed")
                self._in_hand.pop(claim.shard.name, None)
            else:
                self._in_hand.pop(claim.shard.name, None)
            finally:
                slot.close()
                self._room.release()
                self._metrics.in_hand.set(len(self._in_hand))

    async def _score(self, claim: Claim, *, on_wait: Callable[[], None]) -> None:
        """Score until it works; while the model or a store is away, that is as long as they are."""
        attempts = 0
        while True:
            await self._ready.wait()
            assert self._scoring is not None
            try:
                with tracing.span("scorer.shard", parent=claim.shard.traceparent, kind="consumer") as span:
                    if span is not None:
                        span.set_attributes(self._attributes(claim))
                    result = await self._scoring.score(claim.shard, on_wait=on_wait)
                    if span is not None:
                        span.set_attribute("jest.inferred", result.inferred)
                        span.set_attribute("jest.cache_hits", len(result.keys) - result.inferred)
                    with tracing.span("scorer.complete"):
                        await self._queue.complete(claim, result)
            except StoreUnavailable as error:
                _log.warning("store does not answer", error=str(error))
                await asyncio.sleep(STORE_RETRY_S)
                continue
            except ReferenceModelError as error:
                _log.warning("inference failed", error=str(error), retryable=error.retryable)
                attempts += 1
                if not await self._model.ready():
                    attempts = 0
                    self._ready.clear()
                elif not error.retryable:
                    raise UnscorableShard("INFERENCE_REFUSED", str(error)) from error
                elif attempts >= self._settings.max_attempts:
                    raise UnscorableShard("INFERENCE_FAILED", f"{attempts} attempts: {error}") from error
                await asyncio.sleep(READY_POLL_S)
                continue
            self._metrics.shards.labels("scored").inc()
            self._metrics.inferred.inc(result.inferred)
            self._metrics.cache_hits.inc(len(result.keys) - result.inferred)
            return

    async def _dead_letter(self, claim: Claim, reason: str, detail: str) -> None:
        shard = claim.shard
        detail_of_shard = f"shard {shard.shard_id}: {detail}"
        letter = DeadLetter.of(shard.ref, reason=reason, detail=detail_of_shard, at_s=time.time())
        with tracing.span("scorer.dead_letter", parent=shard.traceparent, kind="consumer") as span:
            if span is not None:
                span.set_attributes(self._attributes(claim) | {"jest.reason": reason, "jest.detail": detail})
            is_first = await self._decisions.dead_letter(letter)
        if is_first:
            self._metrics.dead_letters.labels(reason).inc()
        self._metrics.shards.labels("dead_lettered").inc()
        _log.error("super-batch dead-lettered", reason=reason, detail=detail)

    def _attributes(self, claim: Claim) -> dict[str, str | int]:
        shard = claim.shard
        return {
            "jest.job": shard.job,
            "jest.super_batch": shard.super_batch_id,
            "jest.shard": shard.shard_id,
            "jest.examples": len(shard.keys),
            "jest.deliveries": claim.deliveries,
            "jest.consumer": self._settings.consumer,
        }
