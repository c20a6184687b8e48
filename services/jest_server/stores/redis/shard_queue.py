"""The queue of shards between selectors and scorers, a line for each version of a reference model; and the news.

What waits takes turns (turns.lua); what is being scored is in a stream with a consumer group. No locks: an entry
belongs to the consumer that claimed it, and Redis hands it to another only if it was left alone for long enough.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jest_server.domain.errors import StoreUnavailable
from jest_server.domain.shards import Claim, QueueState, Shard
from jest_server.domain.storage import MemoryUse
from jest_server.domain.super_batches import SuperBatchEvent
from jest_server.stores import blobs
from jest_server.stores.redis.connection import answering, connect, milliseconds, run, script, text
from jest_server.stores.redis.keys import DEFAULT_PREFIX, GROUP, Keys, line_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.shards import ShardResult

BLOCK_S = 2.0
"""Longest single blocking read: a silent server is noticed so much later than by other commands."""
SHORTEST_BLOCK_S = 0.001
"""0 would block for ever."""
CONSUMER_FORGOTTEN_S = 86400.0
"""A consumer that holds nothing and was not seen for so long is struck off the group."""
NEWS_BATCH = 500
NEWS_RETRY_S = 0.2


class RedisShardQueue:
    """The scorers' half of SuperBatchStore, and the news.

    Blocking reads use connections of their own, so that no other command waits behind them.
    """

    def __init__(self, url: str, *, prefix: str = DEFAULT_PREFIX) -> None:
        self._keys = Keys(prefix)
        self._client = connect(url)
        self._blocking = connect(url)
        self._claim = script(self._client, "turns", "claim")
        self._complete = script(self._client, "turns", "usage", "complete")
        self._keep = script(self._client, "held", "keep")
        self._reclaim = script(self._client, "reclaim")
        self._release = script(self._client, "held", "turns", "release")

    async def ping(self) -> None:
        """See the port."""
        async with answering("queue"):
            await self._client.ping()

    async def close(self) -> None:
        """See the port."""
        await self._client.aclose()
        await self._blocking.aclose()

    async def claim(self, consumer: str, reference: ReferenceInfo, *, count: int, block_s: float) -> list[Claim]:
        """See the port. A claim whose answer is lost, as by cancellation, is left to ``reclaim``."""
        line = line_of(reference.name, reference.version)
        give_up_at = time.monotonic() + block_s
        while True:
            claims = await self._take(consumer, line, count)
            left_s = give_up_at - time.monotonic()
            if claims or left_s <= 0:
                return claims
            # The bell may ring for a shard that another consumer takes, and not ring for one that was there before.
            block = min(left_s, BLOCK_S)
            async with answering("queue", blocking_s=block):
                await self._blocking.blpop([self._keys.bell(line)], timeout=max(block, SHORTEST_BLOCK_S))

    async def reclaim(self, consumer: str, reference: ReferenceInfo, *, idle_s: float, count: int) -> list[Claim]:
        """See the port."""
        forget_ms = milliseconds(CONSUMER_FORGOTTEN_S)
        stream = self._keys.shards(line_of(reference.name, reference.version))
        async with answering("queue"):
            taken: Any = await self._reclaim(
                keys=[stream], args=[GROUP, consumer, round(idle_s * 1000), count, forget_ms]
            )
        entries = []
        for token, times, flat in taken:
            fields = {text(name): text(value) for name, value in zip(flat[::2], flat[1::2], strict=True)}
            entries.append(_Entry(text(token), int(fields["earlier"]) + int(times), fields))
        return await self._claims(stream, entries)

    async def keep(self, consumer: str, claims: Sequence[Claim]) -> None:
        """See the port."""
        tokens: dict[str, list[str]] = {}
        for claim in claims:
            tokens.setdefault(_line(claim.shard), []).append(claim.token)
        for line, held in tokens.items():
            async with answering("queue"):
                await self._keep(keys=[self._keys.shards(line)], args=[GROUP, consumer, *held])

    async def complete(self, claim: Claim, result: ShardResult) -> None:
        """See the port."""
        job, super_batch_id, shard_id = claim.shard.job, claim.shard.super_batch_id, claim.shard.shard_id
        blob = blobs.pack({"keys": result.keys, "inferred": result.inferred}, result.embeddings)
        async with answering("queue"):
            await self._complete(
                keys=[
                    self._keys.shards(_line(claim.shard)),
                    self._keys.super_batch(job, super_batch_id),
                    self._keys.results(job, super_batch_id),
                    self._keys.features(job, super_batch_id, shard_id),
                    self._keys.news,
                    self._keys.queued,
                    self._keys.usage,
                ],
                args=[
                    GROUP,
                    claim.token,
                    shard_id,
                    blob,
                    job,
                    super_batch_id,
                    self._keys.prefix,
                    _line(claim.shard),
                ],
            )

    async def release(self, consumer: str, claims: Sequence[Claim]) -> None:
        """See the port."""
        for claim in claims:
            shard = claim.shard
            async with answering("queue"):
                await self._release(
                    keys=[
                        self._keys.shards(_line(shard)),
                        self._keys.super_batch(shard.job, shard.super_batch_id),
                        self._keys.in_flight,
                        self._keys.queued,
                    ],
                    args=[
                        GROUP,
                        consumer,
                        claim.token,
                        claim.deliveries - 1,
                        shard.job,
                        shard.super_batch_id,
                        shard.shard_id,
                        self._keys.prefix,
                        _line(shard),
                    ],
                )

    async def lines(self) -> list[QueueState]:
        """See the port."""
        async with answering("queue"):
            lines: Any = await self._client.hgetall(self._keys.lines)
        found = []
        for line, held in sorted((text(line), json.loads(held)) for line, held in lines.items()):
            async with answering("queue"):
                jobs = [text(job) for job in await self._client.zrange(self._keys.turns(line), 0, -1)]
            async with answering("queue"), self._client.pipeline(transaction=False) as pipe:
                pipe.xlen(self._keys.shards(line))
                for job in jobs:
                    pipe.zcard(self._keys.waiting(line, job))
                scoring, *waiting = await run(pipe)
            counts = {job: count for job, count in zip(jobs, waiting, strict=True) if count}
            if counts or scoring:
                found.append(QueueState(**held, waiting=counts, scoring=scoring))
        return sorted(found, key=lambda line: (line.model, line.version))

    async def memory(self) -> MemoryUse:
        """See the port."""
        async with answering("queue"):
            memory: Any = await self._client.info("memory")
        return MemoryUse(used_bytes=memory["used_memory"], max_bytes=memory["maxmemory"])

    async def queue_depth(self) -> int:
        """See the port."""
        async with answering("queue"):
            return int(await self._client.zcard(self._keys.queued))

    async def oldest_queued_age_s(self, *, now_s: float) -> float:
        """See the port."""
        async with answering("queue"):
            oldest: Any = await self._client.zrange(self._keys.queued, 0, 0, withscores=True)
        return max(0.0, now_s - oldest[0][1] / 1000) if oldest else 0.0

    async def news(self) -> AsyncIterator[SuperBatchEvent]:
        """See the port."""
        last = await self._last_news()
        while True:
            try:
                async with answering("queue", blocking_s=BLOCK_S):
                    streams: Any = await self._blocking.xread(
                        {self._keys.news: last}, count=NEWS_BATCH, block=milliseconds(BLOCK_S)
                    )
                    if not streams and _order(await self._last_news()) < _order(last):
                        last = "0-0"  # the stream was emptied: its ids may start again
            except StoreUnavailable:
                await asyncio.sleep(NEWS_RETRY_S)
                continue
            for _, entries in streams:
                for entry_id, fields in entries:
                    last = text(entry_id)
                    yield SuperBatchEvent(job=text(fields[b"job"]), super_batch_id=text(fields[b"id"]))

    async def _last_news(self) -> str:
        try:
            async with answering("queue"):
                newest = await self._client.xrevrange(self._keys.news, count=1)
        except StoreUnavailable:
            return "0-0"
        return text(newest[0][0]) if newest else "0-0"

    async def _take(self, consumer: str, line: str, count: int) -> list[Claim]:
        stream = self._keys.shards(line)
        async with answering("queue"):
            taken: Any = await self._claim(
                keys=[stream, self._keys.weights], args=[GROUP, consumer, count, self._keys.prefix, line]
            )
        entries = []
        for token, earlier, job, super_batch_id, shard_id in taken:
            fields = {"job": text(job), "id": text(super_batch_id), "shard": text(shard_id)}
            entries.append(_Entry(text(token), int(earlier) + 1, fields))
        return await self._claims(stream, entries)

    async def _claims(self, stream: str, entries: list[_Entry]) -> list[Claim]:
        """Looks up what claimed entries are about; those that were let go or completed since are dropped."""
        if not entries:
            return []
        async with answering("queue"):
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.mget([self._keys.features(e.fields["job"], e.fields["id"], e.fields["shard"]) for e in entries])
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
            # No time: completed at this very moment, by whoever was thought dead.
            Claim(_unpack_shard(entry.fields, blob), entry.token, entry.deliveries, (ms or time.time() * 1000) / 1000)
            for entry, blob, ms in zip(entries, blobs, queued_ms, strict=True)
            if blob is not None
        ]


@dataclass(frozen=True)
class _Entry:
    """A shard in a consumer's hands, before its features are looked up."""

    token: str
    deliveries: int
    fields: Mapping[str, str]

    @property
    def member(self) -> str:
        return "/".join((self.fields["job"], self.fields["id"], self.fields["shard"]))


def pack_shard(shard: Shard) -> bytes:
    """Returns what a shard's features key holds."""
    description: dict[str, Any] = {
        "model": shard.reference_model,
        "version": shard.reference_version,
        "keys": shard.keys,
    }
    if shard.traceparent:
        description["traceparent"] = shard.traceparent
    return blobs.pack(description, shard.features)


def _line(shard: Shard) -> str:
    return line_of(shard.reference_model, shard.reference_version)


def _unpack_shard(fields: Mapping[str, str], blob: bytes) -> Shard:
    description, features = blobs.unpack(blob)
    return Shard(
        shard_id=fields["shard"],
        job=fields["job"],
        super_batch_id=fields["id"],
        reference_model=description["model"],
        reference_version=description["version"],
        keys=tuple(description["keys"]),
        features=bytes(features),
        traceparent=description.get("traceparent", ""),
    )


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds_, _, number = entry_id.partition("-")
    return int(milliseconds_), int(number)
