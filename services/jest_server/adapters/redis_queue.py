"""The queue of shards between selectors and scorers: one Redis stream with a consumer group, and a stream of news.

No locks: an entry belongs to the consumer that claimed it, and Redis itself hands it to another only if it was left
alone for long enough.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from jest_server import records
from jest_server.adapters import redis_keys as keys
from jest_server.adapters.redis_connection import answering, script, text
from jest_server.errors import StoreUnavailable
from jest_server.model import Claim, News, Shard

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from redis.asyncio import Redis

    from jest_server.model import ShardResult

RESULT_KEEP_MS = 24 * 3600 * 1000
NEWS_BLOCK_MS = 2000
NEWS_BATCH = 500
NEWS_RETRY_S = 0.2


class RedisShardQueue:
    """The scorers' half of SuperBatchStore, and the news."""

    def __init__(self, client: Redis, blocking: Redis) -> None:
        self._client = client
        self._blocking = blocking
        self._complete = script(client, "complete")
        self._keep = script(client, "keep")
        self._release = script(client, "release")

    async def ping(self) -> None:
        """See the port."""
        with answering("queue"):
            await self._client.ping()

    async def close(self) -> None:
        """See the port."""
        await self._client.aclose()
        await self._blocking.aclose()

    async def claim(self, consumer: str, *, count: int, block_s: float) -> list[Claim]:
        """See the port."""
        with answering("queue"):
            entries = await self._read_group(consumer, count, max(1, round(block_s * 1000)))
        return await self._claims(entries, {})

    async def reclaim(self, consumer: str, *, idle_s: float, count: int) -> list[Claim]:
        """See the port."""
        with answering("queue"):
            try:
                _, entries, *_ = await self._client.xautoclaim(
                    keys.SHARDS, keys.GROUP, consumer, min_idle_time=round(idle_s * 1000), count=count
                )
            except ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                return []
            deliveries: dict[str, int] = {}
            for token, _ in entries:
                pending = await self._client.xpending_range(keys.SHARDS, keys.GROUP, token, token, 1)
                deliveries |= {text(entry["message_id"]): int(entry["times_delivered"]) for entry in pending}
        return await self._claims(entries, deliveries)

    async def keep(self, consumer: str, claims: Sequence[Claim]) -> None:
        """See the port."""
        if claims:
            with answering("queue"):
                await self._keep(keys=[keys.SHARDS], args=[keys.GROUP, consumer, *(claim.token for claim in claims)])

    async def complete(self, claim: Claim, result: ShardResult) -> None:
        """See the port."""
        shard = claim.shard
        job, super_batch_id = shard.job, shard.super_batch_id
        blob = records.pack({"keys": result.keys, "inferred": result.inferred}, result.embeddings)
        with answering("queue"):
            await self._complete(
                keys=[
                    keys.SHARDS,
                    keys.super_batch(job, super_batch_id),
                    keys.IN_FLIGHT,
                    keys.results(job, super_batch_id),
                    keys.features(job, super_batch_id, shard.shard_id),
                    keys.NEWS,
                ],
                args=[
                    keys.GROUP,
                    claim.token,
                    keys.member(job, super_batch_id),
                    shard.shard_id,
                    blob,
                    RESULT_KEEP_MS,
                    job,
                    super_batch_id,
                ],
            )

    async def release(self, consumer: str, claims: Sequence[Claim]) -> None:
        """See the port."""
        if not claims:
            return
        parts: list[Any] = []
        for claim in claims:
            shard = claim.shard
            parts += [claim.token, claim.deliveries - 1, shard.job, shard.super_batch_id, shard.shard_id]
        with answering("queue"):
            await self._release(keys=[keys.SHARDS], args=[keys.GROUP, consumer, *parts])

    async def queue_depth(self) -> int:
        """See the port."""
        with answering("queue"):
            return int(await self._client.xlen(keys.SHARDS))

    async def oldest_queued_age_s(self, *, now_s: float) -> float:
        """See the port."""
        with answering("queue"):
            entries = await self._client.xrange(keys.SHARDS, count=1)
        if not entries:
            return 0.0
        return max(0.0, now_s - int(text(entries[0][0]).partition("-")[0]) / 1000)

    async def news(self) -> AsyncIterator[News]:
        """See the port."""
        last = await self._last_news()
        while True:
            try:
                with answering("queue"):
                    streams: Any = await self._blocking.xread({keys.NEWS: last}, count=NEWS_BATCH, block=NEWS_BLOCK_MS)
                    if not streams and _order(await self._last_news()) < _order(last):
                        last = "0-0"  # the stream was emptied: its ids may start again
            except StoreUnavailable:
                await asyncio.sleep(NEWS_RETRY_S)
                continue
            for _, entries in streams:
                for entry_id, fields in entries:
                    last = text(entry_id)
                    yield News(job=text(fields[b"job"]), super_batch_id=text(fields[b"id"]))

    async def _last_news(self) -> str:
        try:
            with answering("queue"):
                newest = await self._client.xrevrange(keys.NEWS, count=1)
        except StoreUnavailable:
            return "0-0"
        return text(newest[0][0]) if newest else "0-0"

    async def _read_group(self, consumer: str, count: int, block_ms: int) -> list[Any]:
        for _ in range(2):
            try:
                streams: Any = await self._blocking.xreadgroup(
                    keys.GROUP, consumer, {keys.SHARDS: ">"}, count=count, block=block_ms
                )
            except ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                await self._make_group()
            else:
                return list(streams[0][1]) if streams else []
        return []

    async def _make_group(self) -> None:
        try:
            await self._client.xgroup_create(keys.SHARDS, keys.GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def _claims(self, entries: list[Any], deliveries: dict[str, int]) -> list[Claim]:
        """Looks up the features of claimed entries; those whose super-batch let go of them are dropped."""
        claims = []
        for entry_id, raw in entries:
            token = text(entry_id)
            fields = {text(name): text(value) for name, value in raw.items()}
            with answering("queue"):
                blob: Any = await self._client.get(keys.features(fields["job"], fields["id"], fields["shard"]))
                if blob is None:
                    await self._client.xack(keys.SHARDS, keys.GROUP, token)
                    await self._client.xdel(keys.SHARDS, token)
                    continue
            description, features = records.unpack(blob)
            shard = Shard(
                shard_id=fields["shard"],
                job=fields["job"],
                super_batch_id=fields["id"],
                reference_model=description["model"],
                reference_version=description["version"],
                keys=tuple(description["keys"]),
                features=bytes(features),
            )
            claims.append(Claim(shard, token, int(fields["earlier"]) + deliveries.get(token, 1)))
        return claims


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)
