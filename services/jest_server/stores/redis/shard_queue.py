"""The queue of shards between selectors and scorers: one model queue for each version of a reference model.

Waiting shards are ordered by turns.lua; those being scored are in a stream with a consumer group. No locks: an entry
belongs to the consumer that claimed it, and Redis hands it to another only if it was idle for long enough.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from jest_server.domain.ports import ShardQueue
from jest_server.domain.shards import Claim, QueueState, Shard
from jest_server.domain.super_batches import SuperBatchRef
from jest_server.stores.redis.connection import milliseconds, run, text, translate_redis_errors
from jest_server.stores.redis.keys import GROUP, line_of
from jest_server.stores.redis.shard_codec import pack_result, unpack_shard

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.shards import ShardResult
    from jest_server.stores.redis.context import RedisContext

BLOCK_S = 2.0
"""Longest single blocking read: a silent server is noticed so much later than by other commands."""
SHORTEST_BLOCK_S = 0.001
"""0 would block without limit."""
CONSUMER_FORGOTTEN_S = 86400.0
"""A consumer without claims that was idle for so long is removed from the group."""


class RedisShardQueue(ShardQueue):
    """Model queues on sorted sets, a list that wakes waiting scorers, and a stream of what is being scored."""

    def __init__(self, context: RedisContext) -> None:
        self._client, self._blocking, self._keys = context.client, context.blocking, context.keys
        self._claim = context.script("turns", "claim")
        self._complete = context.script("turns", "usage", "complete")
        self._heartbeat = context.script("held", "keep")
        self._reclaim = context.script("reclaim")
        self._release = context.script("held", "turns", "release")

    @override
    async def claim(self, consumer: str, reference: ReferenceInfo, *, count: int, block_s: float) -> list[Claim]:
        line = line_of(reference.name, reference.version)
        give_up_at = time.monotonic() + block_s
        while True:
            claims = await self._take(consumer, line, count)
            left_s = give_up_at - time.monotonic()
            if claims or left_s <= 0:
                return claims
            # A wakeup may be for a shard that another consumer takes, and there is none for a shard from before.
            block = min(left_s, BLOCK_S)
            async with translate_redis_errors("queue", blocking_s=block):
                await self._blocking.blpop([self._keys.bell(line)], timeout=max(block, SHORTEST_BLOCK_S))

    @override
    async def reclaim(self, consumer: str, reference: ReferenceInfo, *, idle_s: float, count: int) -> list[Claim]:
        forget_ms = milliseconds(CONSUMER_FORGOTTEN_S)
        stream = self._keys.shards(line_of(reference.name, reference.version))
        async with translate_redis_errors("queue"):
            taken: Any = await self._reclaim(
                keys=[stream], args=[GROUP, consumer, round(idle_s * 1000), count, forget_ms]
            )
        entries = []
        for token, times, flat in taken:
            fields = {text(name): text(value) for name, value in zip(flat[::2], flat[1::2], strict=True)}
            entries.append(_Entry(text(token), int(fields["earlier"]) + int(times), fields))
        return await self._claims(stream, entries)

    @override
    async def heartbeat(self, consumer: str, claims: Sequence[Claim]) -> None:
        tokens: dict[str, list[str]] = {}
        for claim in claims:
            tokens.setdefault(_line(claim.shard), []).append(claim.token)
        for line, held in tokens.items():
            async with translate_redis_errors("queue"):
                await self._heartbeat(keys=[self._keys.shards(line)], args=[GROUP, consumer, *held])

    @override
    async def complete(self, claim: Claim, result: ShardResult) -> None:
        shard, ref = claim.shard, claim.shard.ref
        async with translate_redis_errors("queue"):
            await self._complete(
                keys=[
                    self._keys.shards(_line(shard)),
                    self._keys.super_batch(ref),
                    self._keys.results(ref),
                    self._keys.features(ref, shard.shard_id),
                    self._keys.news,
                    self._keys.queued,
                    self._keys.usage,
                ],
                args=[
                    GROUP,
                    claim.token,
                    shard.shard_id,
                    pack_result(result),
                    ref.job,
                    ref.super_batch_id,
                    self._keys.prefix,
                    _line(shard),
                ],
            )

    @override
    async def release(self, consumer: str, claims: Sequence[Claim]) -> None:
        for claim in claims:
            shard, ref = claim.shard, claim.shard.ref
            async with translate_redis_errors("queue"):
                await self._release(
                    keys=[
                        self._keys.shards(_line(shard)),
                        self._keys.super_batch(ref),
                        self._keys.in_flight,
                        self._keys.queued,
                    ],
                    args=[
                        GROUP,
                        consumer,
                        claim.token,
                        claim.deliveries - 1,
                        ref.job,
                        ref.super_batch_id,
                        shard.shard_id,
                        self._keys.prefix,
                        _line(shard),
                    ],
                )

    @override
    async def queue_states(self) -> list[QueueState]:
        async with translate_redis_errors("queue"):
            lines: Any = await self._client.hgetall(self._keys.lines)
        found = []
        for line, held in sorted((text(line), json.loads(held)) for line, held in lines.items()):
            async with translate_redis_errors("queue"):
                jobs = [text(job) for job in await self._client.zrange(self._keys.turns(line), 0, -1)]
            async with translate_redis_errors("queue"), self._client.pipeline(transaction=False) as pipe:
                pipe.xlen(self._keys.shards(line))
                for job in jobs:
                    pipe.zcard(self._keys.waiting(line, job))
                scoring, *waiting = await run(pipe)
            counts = {job: count for job, count in zip(jobs, waiting, strict=True) if count}
            if counts or scoring:
                found.append(QueueState(**held, waiting=counts, scoring=scoring))
        return sorted(found, key=lambda state: (state.model, state.version))

    @override
    async def depth(self) -> int:
        async with translate_redis_errors("queue"):
            return int(await self._client.zcard(self._keys.queued))

    @override
    async def oldest_age_s(self, *, now_s: float) -> float:
        async with translate_redis_errors("queue"):
            oldest: Any = await self._client.zrange(self._keys.queued, 0, 0, withscores=True)
        return max(0.0, now_s - oldest[0][1] / 1000) if oldest else 0.0

    async def _take(self, consumer: str, line: str, count: int) -> list[Claim]:
        stream = self._keys.shards(line)
        async with translate_redis_errors("queue"):
            taken: Any = await self._claim(
                keys=[stream, self._keys.weights], args=[GROUP, consumer, count, self._keys.prefix, line]
            )
        entries = []
        for token, earlier, job, super_batch_id, shard_id in taken:
            fields = {"job": text(job), "id": text(super_batch_id), "shard": text(shard_id)}
            entries.append(_Entry(text(token), int(earlier) + 1, fields))
        return await self._claims(stream, entries)

    async def _claims(self, stream: str, entries: list[_Entry]) -> list[Claim]:
        """Look up what claimed entries are about; drop those that were completed or left flight since."""
        if not entries:
            return []
        async with translate_redis_errors("queue"):
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.mget([self._keys.features(entry.ref, entry.fields["shard"]) for entry in entries])
                pipe.zmscore(self._keys.queued, [entry.member for entry in entries])
                blobs, queued_ms = await run(pipe)
            dropped = [entry for entry, blob in zip(entries, blobs, strict=True) if blob is None]
            if dropped:
                tokens = [entry.token for entry in dropped]
                async with self._client.pipeline(transaction=False) as pipe:
                    # In this order: if we die in between, reclaim clears up what is deleted and not acknowledged.
                    pipe.xdel(stream, *tokens)
                    pipe.xack(stream, GROUP, *tokens)
                    pipe.zrem(self._keys.queued, *(entry.member for entry in dropped))
                    await run(pipe)
        return [
            # No time: completed at this very moment, by a consumer that was presumed dead.
            Claim(
                unpack_shard(entry.ref, entry.fields["shard"], blob),
                entry.token,
                entry.deliveries,
                (ms or time.time() * 1000) / 1000,
            )
            for entry, blob, ms in zip(entries, blobs, queued_ms, strict=True)
            if blob is not None
        ]


@dataclass(frozen=True)
class _Entry:
    """A claimed shard, before its features are looked up."""

    token: str
    deliveries: int
    fields: Mapping[str, str]

    @property
    def ref(self) -> SuperBatchRef:
        return SuperBatchRef(self.fields["job"], self.fields["id"])

    @property
    def member(self) -> str:
        return "/".join((self.fields["job"], self.fields["id"], self.fields["shard"]))


def _line(shard: Shard) -> str:
    return line_of(shard.reference_model, shard.reference_version)
