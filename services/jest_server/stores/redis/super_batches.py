"""Super-batches in flight, in Redis: what their ranks submitted and uploaded, their results, and events about them."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from jest_server.domain.attempts import attempt_name, attempt_number, attempt_superseded, attempt_unknown
from jest_server.domain.chunked import chunked
from jest_server.domain.errors import JobUnknown, StoreUnavailable
from jest_server.domain.ports import SuperBatchStore
from jest_server.domain.super_batches import (
    Limits,
    Submission,
    SubmitResult,
    SubmitStatus,
    SuperBatch,
    SuperBatchEvent,
    SuperBatchRef,
    UploadStatus,
)
from jest_server.domain.tenants import prefix_of
from jest_server.stores.redis.connection import milliseconds, run, text, translate_redis_errors
from jest_server.stores.redis.keys import BACKSTOP_S, queue_of
from jest_server.stores.redis.references import REFERENCE
from jest_server.stores.redis.shard_codec import pack_shard, unpack_result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from jest_server.domain.shards import Shard, ShardResult
    from jest_server.stores.redis.context import RedisContext

UNQUEUED_S = 120.0
"""How long features live that were written but never queued, because the writer died in between."""
RESULT_BATCH = 32
"""Results that are read in one step."""
WRITE_BATCH_BYTES = 8 << 20
"""Features that are written in one step, or one shard's if they are more."""
EVENT_BLOCK_S = 2.0
"""Longest single blocking read of events: a silent server is noticed so much later than by other commands."""
EVENT_BATCH = 500
EVENT_RETRY_S = 0.2


class RedisSuperBatchStore(SuperBatchStore):
    """A hash for each super-batch in flight, its features and results beside it, and one stream of events."""

    def __init__(self, context: RedisContext) -> None:
        self._client, self._blocking, self._keys = context.client, context.blocking, context.keys
        self._submit = context.script("usage", "submit")
        self._add_upload = context.script("fair_queue", "usage", "add_upload")

    @override
    async def submit(self, submission: Submission, *, limits: Limits, ttl_s: float, now_s: float) -> SubmitResult:
        ref, reference = submission.ref, submission.reference
        own = REFERENCE.dump_json(reference)
        async with translate_redis_errors("queue"):
            answer: Any = await self._submit(
                self._keys.super_batch(ref),
                self._keys.decision(ref),
                self._keys.dead_letters(ref.job),
                self._keys.in_flight,
                self._keys.counters(ref.job),
                self._keys.jobs,
                self._keys.usage,
                self._keys.attempt(ref.job),
                **ref.metadata,
                attempt=attempt_number(ref.super_batch_id),
                rank=submission.rank,
                digest=submission.digest,
                rows=len(submission.keys),
                world_size=submission.world_size,
                step=submission.step,
                reference=own.decode(),
                queue="" if reference is None else queue_of(reference.name, reference.version),
                now_s=now_s,
                deadline_s=now_s + ttl_s,
                ttl_ms=milliseconds(ttl_s + BACKSTOP_S),
                limits=asdict(limits),
                payload=submission.model_dump_json(exclude={"reference"}),
            )
        status = text(answer[0])
        if status == "no_job":
            raise JobUnknown(f"job {ref.job!r} does not exist any more", {"job": ref.job})
        if status == "no_attempt":
            raise attempt_unknown(ref.job, attempt_name(attempt_number(ref.super_batch_id)), submission.metadata)
        if status == "superseded":
            raise attempt_superseded(ref.job, attempt_name(int(answer[1])), int(answer[2]), submission.metadata)
        if len(answer) == 1:
            return SubmitResult(SubmitStatus(status))
        pinned, step, *uploads = answer[1:]
        return SubmitResult(
            SubmitStatus(status),
            reference if pinned == own else REFERENCE.validate_json(pinned),
            int(step) if step else None,
            frozenset(position for positions in uploads for position in json.loads(positions)),
        )

    @override
    async def get_super_batch(self, ref: SuperBatchRef) -> SuperBatch | None:
        async with translate_redis_errors("queue"):
            held = await self._client.hgetall(self._keys.super_batch(ref))
        if not held:
            return None
        fields = {text(name): value for name, value in held.items()}
        reference = REFERENCE.validate_json(fields["reference"])
        submissions: dict[int, Submission] = {}
        uploads: dict[int, dict[str, tuple[int, ...]]] = {}
        for name, value in fields.items():
            kind, _, rest = name.partition(":")
            if kind == "rank":
                submissions[int(rest)] = Submission(**json.loads(value), reference=reference)
            elif kind == "upload":
                rank, _, digest = rest.partition(":")
                uploads.setdefault(int(rank), {})[digest] = tuple(json.loads(value))
        return SuperBatch(
            job=ref.job,
            super_batch_id=ref.super_batch_id,
            world_size=int(fields["world_size"]),
            reference=reference,
            created_at_s=float(fields["created_at"]),
            step=int(fields["step"]),
            submissions=submissions,
            uploads=uploads,
            pending_shards=sum(name.startswith("shard:") for name in fields),
        )

    @override
    async def row_counts(self, ref: SuperBatchRef, ranks: Iterable[int]) -> dict[int, int]:
        wanted = list(ranks)
        if not wanted:
            return {}
        async with translate_redis_errors("queue"):
            rows: Any = await self._client.hmget(self._keys.super_batch(ref), [f"rows:{rank}" for rank in wanted])
        return {rank: int(count) for rank, count in zip(wanted, rows, strict=True) if count is not None}

    @override
    async def add_upload(
        self,
        ref: SuperBatchRef,
        rank: int,
        *,
        digest: str,
        positions: tuple[int, ...],
        shards: Sequence[Shard],
        limits: Limits,
    ) -> UploadStatus:
        """The features are written first, so that no scorer ever finds a shard without them."""
        super_batch = self._keys.super_batch(ref)
        features = {self._keys.features(ref, shard.shard_id): shard for shard in shards}
        async with translate_redis_errors("queue"):
            if await self._client.hexists(super_batch, f"upload:{rank}:{digest}"):
                return UploadStatus.REPEATED
        await self._write_features(features)
        queue, model = _queue_of(shards)
        async with translate_redis_errors("queue"):
            status = await self._add_upload(
                self._keys.prefix,
                super_batch,
                self._keys.in_flight,
                self._keys.queued,
                self._keys.usage,
                self._keys.model_queues,
                *features,
                **ref.metadata,
                rank=rank,
                digest=digest,
                positions=json.dumps(positions),
                shards=[shard.shard_id for shard in features.values()],
                queue=queue,
                model=model,
                now_ms=round(time.time() * 1000),
                limits=asdict(limits),
            )
        if text(status) == "lost":
            raise StoreUnavailable("the queue lost the features of an upload before it was queued", retry_after_s=0.0)
        return UploadStatus(text(status))

    @override
    async def get_results(self, ref: SuperBatchRef) -> list[ShardResult]:
        key = self._keys.results(ref)
        async with translate_redis_errors("queue"):
            shard_ids: list[Any] = await self._client.hkeys(key)
        results = []
        for batch in chunked(shard_ids, RESULT_BATCH):
            async with translate_redis_errors("queue"):
                held: list[Any] = await self._client.hmget(key, list(batch))
            results += [unpack_result(blob) for blob in held if blob is not None]
        return results

    @override
    async def bytes_held(self, job: str) -> Limits:
        tenant = prefix_of(job)
        levels = (f"{job}/", tenant, "")
        async with translate_redis_errors("queue"):
            held: Any = await self._client.hmget(self._keys.usage, [f"bytes|{level}" for level in levels])
        found = [int(amount or 0) for amount in held]
        return Limits(job=found[0], tenant=found[1] if tenant else 0, server=found[2])

    @override
    async def events(self) -> AsyncIterator[SuperBatchEvent]:
        last = await self._last_event()
        while True:
            try:
                async with translate_redis_errors("queue", blocking_s=EVENT_BLOCK_S):
                    streams: Any = await self._blocking.xread(
                        {self._keys.events: last}, count=EVENT_BATCH, block=milliseconds(EVENT_BLOCK_S)
                    )
                    if not streams and _order(await self._last_event()) < _order(last):
                        last = "0-0"  # the stream was emptied: its ids may start again
            except StoreUnavailable:
                await asyncio.sleep(EVENT_RETRY_S)
                continue
            for _, entries in streams:
                for entry_id, fields in entries:
                    last = text(entry_id)
                    yield SuperBatchEvent(SuperBatchRef(text(fields[b"job"]), text(fields[b"id"])))

    async def _last_event(self) -> str:
        try:
            async with translate_redis_errors("queue"):
                newest = await self._client.xrevrange(self._keys.events, count=1)
        except StoreUnavailable:
            return "0-0"
        return text(newest[0][0]) if newest else "0-0"

    async def _write_features(self, features: Mapping[str, Shard]) -> None:
        """Write them for a short life, some MiB at a time; what is queued then lives on."""
        waiting: list[tuple[str, bytes]] = []
        for number, (key, shard) in enumerate(features.items(), start=1):
            waiting.append((key, pack_shard(shard)))
            if number == len(features) or sum(len(blob) for _, blob in waiting) >= WRITE_BATCH_BYTES:
                async with translate_redis_errors("queue"), self._client.pipeline(transaction=False) as pipe:
                    for name, blob in waiting:
                        pipe.set(name, blob, px=milliseconds(UNQUEUED_S))
                    await run(pipe)
                waiting.clear()


def _queue_of(shards: Sequence[Shard]) -> tuple[str, str]:
    """Return the model queue of an upload's shards, which are all for one version of one model, and what it is for."""
    if not shards:
        return "", ""
    model, version = shards[0].reference_model, shards[0].reference_version
    return queue_of(model, version), json.dumps({"model": model, "version": version})


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds_, _, number = entry_id.partition("-")
    return int(milliseconds_), int(number)
