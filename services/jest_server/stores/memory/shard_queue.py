"""The queue of shards in this process's memory, a line for each version of a reference model; and the news."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jest_server.domain.shards import Claim, QueueState, Shard
from jest_server.domain.storage import MemoryUse
from jest_server.domain.super_batches import SuperBatchEvent
from jest_server.stores.memory.model_queue import Line, Place

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.shards import ShardResult
    from jest_server.stores.memory.state import InFlight, JobState

NEWS_KEPT = 4096
"""Of what a listener has not taken yet; the oldest go first."""

_VersionName = tuple[str, str]


class MemoryShardQueue:
    """The scorers' half of SuperBatchStore, and the news."""

    def __init__(self) -> None:
        self._jobs: dict[str, JobState] = {}
        self._queue: dict[str, _Queued] = {}
        self._lines: dict[_VersionName, Line] = {}
        self._tokens = 0
        self._turns = 0
        self._queued = asyncio.Event()
        self._listeners: set[asyncio.Queue[SuperBatchEvent]] = set()

    async def ping(self) -> None:
        """See the port."""

    async def close(self) -> None:
        """See the port."""

    async def claim(self, consumer: str, reference: ReferenceInfo, *, count: int, block_s: float) -> list[Claim]:
        """See the port."""
        line = self._line((reference.name, reference.version))
        try:
            async with asyncio.timeout(block_s):
                while (first := line.take_first(self._weight_of)) is None:
                    await self._queued.wait()
        except TimeoutError:
            return []
        claims = [self._take(first[2], consumer)]
        while len(claims) < count and (place := line.take_first(self._weight_of)) is not None:
            claims.append(self._take(place[2], consumer))
        return claims

    async def reclaim(self, consumer: str, reference: ReferenceInfo, *, idle_s: float, count: int) -> list[Claim]:
        """See the port."""
        idle_since = time.monotonic() - idle_s
        version = (reference.name, reference.version)
        idle = [
            (queued.turn, token)
            for token, queued in self._queue.items()
            if queued.consumer is not None and queued.version == version and queued.touched_at <= idle_since
        ]
        return [self._take(token, consumer) for _, token in sorted(idle)[:count]]

    async def keep(self, consumer: str, claims: Sequence[Claim]) -> None:
        """See the port."""
        for _, queued in self._owned(consumer, claims):
            queued.touched_at = time.monotonic()

    async def complete(self, claim: Claim, result: ShardResult) -> None:
        """See the port."""
        shard = claim.shard
        held = self._held(shard.job, shard.super_batch_id)
        token = None if held is None else held.tokens.pop(shard.shard_id, None)
        if held is None or token is None:
            return
        self._dequeue(token)
        held.results[shard.shard_id] = result
        self._tell(shard.job, shard.super_batch_id)

    async def release(self, consumer: str, claims: Sequence[Claim]) -> None:
        """See the port."""
        for _, queued in self._owned(consumer, claims):
            queued.consumer = None
            queued.deliveries -= 1
            self._wait(queued)

    async def lines(self) -> list[QueueState]:
        """See the port."""
        states = []
        for model, version in sorted({queued.version for queued in self._queue.values()}):
            queued = [queued for queued in self._queue.values() if queued.version == (model, version)]
            waiting = Counter(queued.shard.job for queued in queued if queued.consumer is None)
            scoring = sum(queued.consumer is not None for queued in queued)
            states.append(QueueState(model=model, version=version, waiting=dict(waiting), scoring=scoring))
        return states

    async def memory(self) -> MemoryUse:
        """See the port; of features and results alone."""
        held = (super_batch for job in self._jobs.values() for super_batch in job.in_flight.values())
        results = sum(len(result.embeddings) for each in held for result in each.results.values())
        features = sum(len(queued.shard.features) for queued in self._queue.values())
        return MemoryUse(used_bytes=features + results, max_bytes=0)

    async def queue_depth(self) -> int:
        """See the port."""
        return len(self._queue)

    async def oldest_queued_age_s(self, *, now_s: float) -> float:
        """See the port."""
        oldest = min((queued.queued_at_s for queued in self._queue.values()), default=now_s)
        return max(0.0, now_s - oldest)

    async def news(self) -> AsyncIterator[SuperBatchEvent]:
        """See the port."""
        mailbox: asyncio.Queue[SuperBatchEvent] = asyncio.Queue(NEWS_KEPT)
        self._listeners.add(mailbox)
        try:
            while True:
                yield await mailbox.get()
        finally:
            self._listeners.discard(mailbox)

    def _held(self, job: str, super_batch_id: str) -> InFlight | None:
        state = self._jobs.get(job)
        return None if state is None else state.in_flight.get(super_batch_id)

    def _weight_of(self, job: str) -> float:
        return self._jobs[job].job.spec.weight

    def _line(self, version: _VersionName) -> Line:
        return self._lines.setdefault(version, Line())

    def _enqueue(self, held: InFlight, shard: Shard) -> None:
        self._tokens += 1
        held.tokens[shard.shard_id] = token = str(self._tokens)
        place = (held.deadline_s, f"{shard.super_batch_id}/{shard.shard_id}", token)
        self._queue[token] = queued = _Queued(shard, time.time(), place)
        self._wait(queued)

    def _wait(self, queued: _Queued) -> None:
        self._line(queued.version).put(queued.shard.job, queued.place)
        self._queued.set()  # wakes who waits now ...
        self._queued.clear()  # ... and nobody later

    def _dequeue(self, token: str) -> None:
        queued = self._queue.pop(token)
        if queued.consumer is None:
            self._line(queued.version).take_out(queued.shard.job, queued.place)

    def _take(self, token: str, consumer: str) -> Claim:
        queued = self._queue[token]
        if queued.consumer is None:
            self._turns += 1
            queued.turn = self._turns
        queued.consumer, queued.touched_at = consumer, time.monotonic()
        queued.deliveries += 1
        return Claim(queued.shard, token, queued.deliveries, queued.queued_at_s)

    def _owned(self, consumer: str, claims: Sequence[Claim]) -> list[tuple[str, _Queued]]:
        held = ((claim.token, self._queue.get(claim.token)) for claim in claims)
        return [(token, queued) for token, queued in held if queued is not None and queued.consumer == consumer]

    def _let_go(self, state: JobState, super_batch_id: str) -> None:
        for token in state.in_flight.pop(super_batch_id).tokens.values():
            self._dequeue(token)
        self._tell(state.job.spec.name, super_batch_id)

    def _tell(self, job: str, super_batch_id: str) -> None:
        for mailbox in self._listeners:
            if mailbox.full():
                mailbox.get_nowait()
            mailbox.put_nowait(SuperBatchEvent(job, super_batch_id))


@dataclass
class _Queued:
    """A shard that is queued or being scored."""

    shard: Shard
    queued_at_s: float
    place: Place
    deliveries: int = 0
    consumer: str | None = None
    touched_at: float = 0.0
    turn: int = 0
    """Number of the claim that took it; shards in others' hands are taken over in this order."""

    @property
    def version(self) -> _VersionName:
        return self.shard.reference_model, self.shard.reference_version
