"""The queue of shards in this process's memory: one model queue for each version of a reference model."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

from typing_extensions import override

from jest_server.domain.ports import ShardQueue
from jest_server.domain.shards import Claim, QueueState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.shards import ShardResult
    from support.memory_stores.state import MemoryState, QueuedShard


class MemoryShardQueue(ShardQueue):
    """The scorers' view of the shared state."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state

    @override
    async def claim(self, consumer: str, reference: ReferenceInfo, *, count: int, block_s: float) -> list[Claim]:
        queue = self._state.model_queue((reference.name, reference.version))
        try:
            async with asyncio.timeout(block_s):
                while (first := queue.take_first(self._weight_of)) is None:
                    await self._state.shard_arrived.wait()
        except TimeoutError:
            return []
        names = [first[1]]
        while len(names) < count and (place := queue.take_first(self._weight_of)) is not None:
            names.append(place[1])
        return self._deliver(names, consumer)

    @override
    async def reclaim(self, consumer: str, reference: ReferenceInfo, *, idle_s: float, count: int) -> list[Claim]:
        idle_since = time.monotonic() - idle_s
        version = (reference.name, reference.version)
        idle = [
            (queued.heartbeat_at, name)
            for name, queued in self._state.queued.items()
            if queued.consumer is not None and queued.version == version and queued.heartbeat_at <= idle_since
        ]
        return self._deliver([name for _, name in sorted(idle)[:count]], consumer)

    @override
    async def heartbeat(self, consumer: str, claims: Sequence[Claim]) -> None:
        now = time.monotonic()
        for queued in self._owned(consumer, claims):
            queued.heartbeat_at = now

    @override
    async def complete(self, claim: Claim, result: ShardResult) -> None:
        shard = claim.shard
        held = self._state.in_flight(shard.ref)
        if held is None or shard.name not in held.shards:
            return
        held.shards.remove(shard.name)
        self._state.dequeue(shard.name)
        held.results[shard.shard_id] = result
        self._state.publish(shard.ref)

    @override
    async def release(self, consumer: str, claims: Sequence[Claim]) -> None:
        for queued in self._owned(consumer, claims):
            queued.consumer = None
            queued.deliveries -= 1
            self._state.put_back(queued)

    @override
    async def queue_states(self) -> list[QueueState]:
        states = []
        shards = self._state.queued.values()
        for model, version in sorted({queued.version for queued in shards}):
            queued = [queued for queued in shards if queued.version == (model, version)]
            waiting = Counter(queued.shard.job for queued in queued if queued.consumer is None)
            scoring = sum(queued.consumer is not None for queued in queued)
            states.append(QueueState(model=model, version=version, waiting=dict(waiting), scoring=scoring))
        return states

    @override
    async def depth(self) -> int:
        return len(self._state.queued)

    @override
    async def oldest_age_s(self, *, now_s: float) -> float:
        oldest = min((queued.queued_at_s for queued in self._state.queued.values()), default=now_s)
        return max(0.0, now_s - oldest)

    def _weight_of(self, job: str) -> float:
        return self._state.jobs[job].job.spec.weight

    def _deliver(self, names: Sequence[str], consumer: str) -> list[Claim]:
        now, claims = time.monotonic(), []
        for name in names:
            queued = self._state.queued[name]
            queued.consumer, queued.heartbeat_at = consumer, now
            queued.deliveries += 1
            claims.append(Claim(queued.shard, queued.deliveries, queued.queued_at_s))
        return claims

    def _owned(self, consumer: str, claims: Sequence[Claim]) -> list[QueuedShard]:
        held = (self._state.queued.get(claim.shard.name) for claim in claims)
        return [queued for queued in held if queued is not None and queued.consumer == consumer]
