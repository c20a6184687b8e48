"""The queue of shards between selectors and scorers: one model queue for each version of a reference model.

Waiting shards are ordered by fair_queue.lua; those being scored are in a sorted set by their last heartbeat. No locks:
a shard belongs to the consumer that claimed it, and another may reclaim it only if it was idle for long enough.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from jest_server.domain.ports import ShardQueue
from jest_server.domain.shards import Claim, QueueState, Shard
from jest_server.domain.super_batches import SuperBatchRef
from jest_server.stores.redis.connection import run, text, translate_redis_errors
from jest_server.stores.redis.keys import queue_of
from jest_server.stores.redis.shard_codec import pack_result, unpack_shard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.shards import ShardResult
    from jest_server.stores.redis.context import RedisContext

BLOCK_S = 2.0
"""Longest single blocking read: a silent server is noticed so much later than by other commands."""
SHORTEST_BLOCK_S = 0.001
"""0 would block without limit."""


class RedisShardQueue(ShardQueue):
    """Model queues on sorted sets, a list that wakes waiting scorers, and a sorted set of heartbeats."""

    def __init__(self, context: RedisContext) -> None:
        self._client, self._blocking, self._keys = context.client, context.blocking, context.keys
        self._claim = context.script("fair_queue", "claims", "claim")
        self._reclaim = context.script("claims", "reclaim")
        self._heartbeat = context.script("claims", "heartbeat")
        self._release = context.script("fair_queue", "claims", "release")
        self._complete = context.script("fair_queue", "usage", "complete")

    @override
    async def claim(self, consumer: str, reference: ReferenceInfo, *, count: int, block_s: float) -> list[Claim]:
        queue = queue_of(reference.name, reference.version)
        keys = (self._keys.prefix, self._keys.heartbeats(queue), self._keys.weights)
        give_up_at = time.monotonic() + block_s
        while True:
            async with translate_redis_errors("queue"):
                claimed: Any = await self._claim(*keys, queue=queue, consumer=consumer, count=count)
            left_s = give_up_at - time.monotonic()
            if claimed or left_s <= 0:
                return [_claim_of(*record) for record in claimed]
            # A wakeup may be for a shard that another consumer claims, and there is none for a shard from before.
            block = min(left_s, BLOCK_S)
            async with translate_redis_errors("queue", blocking_s=block):
                await self._blocking.blpop([self._keys.wakeup(queue)], timeout=max(block, SHORTEST_BLOCK_S))

    @override
    async def reclaim(self, consumer: str, reference: ReferenceInfo, *, idle_s: float, count: int) -> list[Claim]:
        keys = (self._keys.prefix, self._keys.heartbeats(queue_of(reference.name, reference.version)))
        async with translate_redis_errors("queue"):
            claimed: Any = await self._reclaim(*keys, consumer=consumer, idle_us=round(idle_s * 1e6), count=count)
        return [_claim_of(*record) for record in claimed]

    @override
    async def heartbeat(self, consumer: str, claims: Sequence[Claim]) -> None:
        shards: dict[str, list[Shard]] = {}
        for claim in claims:
            shards.setdefault(_queue_of(claim.shard), []).append(claim.shard)
        for queue, held in shards.items():
            keys = [self._keys.super_batch(shard.ref) for shard in held]
            names = [{"member": shard.name, "shard_id": shard.shard_id} for shard in held]
            async with translate_redis_errors("queue"):
                await self._heartbeat(self._keys.heartbeats(queue), *keys, consumer=consumer, claims=names)

    @override
    async def complete(self, claim: Claim, result: ShardResult) -> None:
        shard, queue = claim.shard, _queue_of(claim.shard)
        async with translate_redis_errors("queue"):
            await self._complete(
                self._keys.prefix,
                self._keys.heartbeats(queue),
                self._keys.super_batch(shard.ref),
                self._keys.results(shard.ref),
                self._keys.features(shard.ref, shard.shard_id),
                self._keys.events,
                self._keys.queued,
                self._keys.usage,
                queue=queue,
                **shard.ref.metadata,
                shard_id=shard.shard_id,
                payload=pack_result(result),
            )

    @override
    async def release(self, consumer: str, claims: Sequence[Claim]) -> None:
        for shard in (claim.shard for claim in claims):
            queue = _queue_of(shard)
            async with translate_redis_errors("queue"):
                await self._release(
                    self._keys.prefix,
                    self._keys.heartbeats(queue),
                    self._keys.super_batch(shard.ref),
                    self._keys.in_flight,
                    queue=queue,
                    consumer=consumer,
                    **shard.ref.metadata,
                    shard_id=shard.shard_id,
                )

    @override
    async def queue_states(self) -> list[QueueState]:
        async with translate_redis_errors("queue"):
            queues: Any = await self._client.hgetall(self._keys.model_queues)
        states = []
        for queue, model in ((text(queue), json.loads(model)) for queue, model in queues.items()):
            async with translate_redis_errors("queue"):
                jobs = [text(job) for job in await self._client.zrange(self._keys.waiting_jobs(queue), 0, -1)]
            async with translate_redis_errors("queue"), self._client.pipeline(transaction=False) as pipe:
                pipe.zcard(self._keys.heartbeats(queue))
                for job in jobs:
                    pipe.zcard(self._keys.waiting(queue, job))
                scoring, *waiting = await run(pipe)
            counts = {job: count for job, count in zip(jobs, waiting, strict=True) if count}
            if counts or scoring:
                states.append(QueueState(**model, waiting=counts, scoring=scoring))
        return sorted(states, key=lambda state: (state.model, state.version))

    @override
    async def depth(self) -> int:
        async with translate_redis_errors("queue"):
            return int(await self._client.zcard(self._keys.queued))

    @override
    async def oldest_age_s(self, *, now_s: float) -> float:
        async with translate_redis_errors("queue"):
            oldest: Any = await self._client.zrange(self._keys.queued, 0, 0, withscores=True)
        return max(0.0, now_s - oldest[0][1] / 1000) if oldest else 0.0


def _queue_of(shard: Shard) -> str:
    return queue_of(shard.reference_model, shard.reference_version)


def _claim_of(job: Any, super_batch_id: Any, shard_id: Any, deliveries: int, queued_ms: Any, features: bytes) -> Claim:
    """Read a record that claims.lua returned."""
    shard = unpack_shard(SuperBatchRef(text(job), text(super_batch_id)), text(shard_id), features)
    return Claim(shard, deliveries, float(queued_ms) / 1000)
