"""The queue of shards between selectors and scorers: one Redis stream with a consumer group, and a stream of news.

No locks: an entry belongs to the consumer that claimed it, and Redis itself hands it to another only if it was left
alone for long enough.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from jest_server import records
from jest_server.adapters.redis_connection import answering, connect, milliseconds, run, script, text
from jest_server.adapters.redis_keys import DEFAULT_PREFIX, GROUP, Keys
from jest_server.errors import StoreUnavailable
from jest_server.logs import get_logger
from jest_server.model import Claim, News, Shard

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from jest_server.model import ShardResult

BLOCK_S = 2.0
"""Longest single blocking read: a silent server is noticed so much later than by other commands."""
CONSUMER_FORGOTTEN_S = 86400.0
"""A consumer that holds nothing and was not seen for so long is struck off the group."""
NEWS_BATCH = 500
NEWS_RETRY_S = 0.2

_log = get_logger()


class RedisShardQueue:
    """The scorers' half of SuperBatchStore, and the news.

    Blocking reads use connections of their own, so that no other command waits behind them.
    """

    def __init__(self, url: str, *, prefix: str = DEFAULT_PREFIX) -> None:
        self._keys = Keys(prefix)
        self._client = connect(url)
        self._blocking = connect(url)
        self._complete = script(self._client, "complete")
        self._keep = script(self._client, "held", "keep")
        self._reclaim = script(self._client, "reclaim")
        self._release = script(self._client, "held", "release")

    async def ping(self) -> None:
        """See the port."""
        async with answering("queue"):
            await self._client.ping()

    async def close(self) -> None:
        """See the port."""
        await self._client.aclose()
        await self._blocking.aclose()

    async def claim(self, consumer: str, *, count: int, block_s: float) -> list[Claim]:
        """See the port. A claim whose answer is lost, as by cancellation, is left to ``reclaim``."""
        give_up_at = time.monotonic() + block_s
        while True:
            left_s = max(0.0, give_up_at - time.monotonic())
            claims = await self._claims(await self._read_group(consumer, count, min(left_s, BLOCK_S)))
            if claims or time.monotonic() >= give_up_at:
                return claims

    async def reclaim(self, consumer: str, *, idle_s: float, count: int) -> list[Claim]:
        """See the port."""
        forget_ms = milliseconds(CONSUMER_FORGOTTEN_S)
        async with answering("queue"):
            taken: Any = await self._reclaim(
                keys=[self._keys.shards], args=[GROUP, consumer, round(idle_s * 1000), count, forget_ms]
            )
        entries = []
        deliveries = {}
        for token, times, flat in taken:
            entries.append((token, dict(zip(flat[::2], flat[1::2], strict=True))))
            deliveries[text(token)] = int(times)
        return await self._claims(entries, deliveries)

    async def keep(self, consumer: str, claims: Sequence[Claim]) -> None:
        """See the port."""
        if claims:
            async with answering("queue"):
                await self._keep(keys=[self._keys.shards], args=[GROUP, consumer, *(claim.token for claim in claims)])

    async def complete(self, claim: Claim, result: ShardResult) -> None:
        """See the port."""
        job, super_batch_id, shard_id = claim.shard.job, claim.shard.super_batch_id, claim.shard.shard_id
        blob = records.pack({"keys": result.keys, "inferred": result.inferred}, result.embeddings)
        async with answering("queue"):
            await self._complete(
                keys=[
                    self._keys.shards,
                    self._keys.super_batch(job, super_batch_id),
                    self._keys.results(job, super_batch_id),
                    self._keys.features(job, super_batch_id, shard_id),
                    self._keys.news,
                ],
                args=[GROUP, claim.token, shard_id, blob, job, super_batch_id],
            )

    async def release(self, consumer: str, claims: Sequence[Claim]) -> None:
        """See the port. A released shard goes to the end of the queue, and its age starts anew."""
        for claim in claims:
            shard = claim.shard
            async with answering("queue"):
                await self._release(
                    keys=[self._keys.shards, self._keys.super_batch(shard.job, shard.super_batch_id)],
                    args=[
                        GROUP,
                        consumer,
                        claim.token,
                        claim.deliveries - 1,
                        shard.job,
                        shard.super_batch_id,
                        shard.shard_id,
                    ],
                )

    async def queue_depth(self) -> int:
        """See the port."""
        async with answering("queue"):
            return int(await self._client.xlen(self._keys.shards))

    async def oldest_queued_age_s(self, *, now_s: float) -> float:
        """See the port."""
        async with answering("queue"):
            entries = await self._client.xrange(self._keys.shards, count=1)
        return max(0.0, now_s - _order(text(entries[0][0]))[0] / 1000) if entries else 0.0

    async def news(self) -> AsyncIterator[News]:
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
                    yield News(job=text(fields[b"job"]), super_batch_id=text(fields[b"id"]))

    async def _last_news(self) -> str:
        try:
            async with answering("queue"):
                newest = await self._client.xrevrange(self._keys.news, count=1)
        except StoreUnavailable:
            return "0-0"
        return text(newest[0][0]) if newest else "0-0"

    async def _read_group(self, consumer: str, count: int, block_s: float) -> list[Any]:
        async with answering("queue", blocking_s=block_s):
            for _ in range(2):
                try:
                    streams: Any = await self._blocking.xreadgroup(
                        GROUP, consumer, {self._keys.shards: ">"}, count=count, block=milliseconds(block_s)
                    )
                except ResponseError as error:
                    if "NOGROUP" not in str(error):
                        raise
                    await self._make_group()
                else:
                    return list(streams[0][1]) if streams else []
        return []

    async def _make_group(self) -> None:
        _log.warning("the queue has no consumer group, making it: the first start, or the queue was flushed")
        try:
            await self._client.xgroup_create(self._keys.shards, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def _claims(self, entries: list[Any], deliveries: Mapping[str, int] | None = None) -> list[Claim]:
        """Looks up the features of claimed entries; those that were let go or completed since are dropped."""
        if not entries:
            return []
        found = [(text(entry_id), {text(k): text(v) for k, v in raw.items()}) for entry_id, raw in entries]
        async with answering("queue"):
            blobs: list[Any] = await self._client.mget(
                [self._keys.features(fields["job"], fields["id"], fields["shard"]) for _, fields in found]
            )
            dropped = [token for (token, _), blob in zip(found, blobs, strict=True) if blob is None]
            if dropped:
                async with self._client.pipeline(transaction=False) as pipe:
                    # In this order: if we die in between, reclaim clears up what is deleted and not acknowledged.
                    pipe.xdel(self._keys.shards, *dropped)
                    pipe.xack(self._keys.shards, GROUP, *dropped)
                    await run(pipe)
        times = deliveries or {}
        return [
            Claim(_unpack_shard(fields, blob), token, int(fields["earlier"]) + times.get(token, 1))
            for (token, fields), blob in zip(found, blobs, strict=True)
            if blob is not None
        ]


def pack_shard(shard: Shard) -> bytes:
    """Returns what a shard's features key holds."""
    description = {"model": shard.reference_model, "version": shard.reference_version, "keys": shard.keys}
    return records.pack(description, shard.features)


def _unpack_shard(fields: Mapping[str, str], blob: bytes) -> Shard:
    description, features = records.unpack(blob)
    return Shard(
        shard_id=fields["shard"],
        job=fields["job"],
        super_batch_id=fields["id"],
        reference_model=description["model"],
        reference_version=description["version"],
        keys=tuple(description["keys"]),
        features=bytes(features),
    )


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds_, _, number = entry_id.partition("-")
    return int(milliseconds_), int(number)
