"""SuperBatchStore on Redis 7 or Valkey. Every change of state is one Lua script; redis_keys tells what is where."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from jest_server.domain.chunked import chunked
from jest_server.domain.errors import JobUnknown, StoreUnavailable
from jest_server.domain.shards import ShardResult
from jest_server.domain.super_batches import Limits, Submission, SubmitStatus, SuperBatch, UploadStatus
from jest_server.domain.tenants import prefix_of
from jest_server.stores import blobs
from jest_server.stores.redis.connection import answering, milliseconds, run, script, text
from jest_server.stores.redis.decisions import BACKSTOP_S, REFERENCE, RedisOutcomes
from jest_server.stores.redis.keys import DEFAULT_PREFIX, line_of, member
from jest_server.stores.redis.shard_queue import pack_shard

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_server.domain.shards import Shard

UNQUEUED_S = 120.0
"""How long features live that were written but never queued, because the writer died in between."""
RESULT_BATCH = 32
"""Results that are read in one step."""
WRITE_BATCH_BYTES = 8 << 20
"""Features that are written in one step, or one shard's if they are more."""


class RedisSuperBatchStore(RedisOutcomes):
    """Super-batches in flight; what becomes of them, jobs, and the queue of shards are in the base classes."""

    def __init__(self, url: str, *, prefix: str = DEFAULT_PREFIX) -> None:
        super().__init__(url, prefix=prefix)
        self._submit = script(self._client, "usage", "submit")
        self._add_upload = script(self._client, "turns", "usage", "add_upload")

    @classmethod
    def from_url(cls, url: str, *, prefix: str = DEFAULT_PREFIX) -> RedisSuperBatchStore:
        """Connects lazily. All keys start with ``prefix``, which holds a hash tag.

        Raises:
            ValueError: If ``url`` or ``prefix`` cannot be; a URL is not repeated in the message.
        """
        return cls(url, prefix=prefix)

    async def submit(self, submission: Submission, *, limits: Limits, ttl_s: float, now_s: float) -> SubmitStatus:
        """See the port."""
        job, super_batch_id, reference = submission.job, submission.super_batch_id, submission.reference
        async with answering("queue"):
            status = await self._submit(
                keys=[
                    self._keys.super_batch(job, super_batch_id),
                    self._keys.decision(job, super_batch_id),
                    self._keys.dead(job),
                    self._keys.in_flight,
                    self._keys.counters(job),
                    self._keys.jobs,
                    self._keys.usage,
                ],
                args=[
                    member(job, super_batch_id),
                    super_batch_id,
                    submission.rank,
                    submission.digest,
                    submission.model_dump_json(exclude={"reference"}),
                    submission.world_size,
                    REFERENCE.dump_json(reference),
                    now_s,
                    now_s + ttl_s,
                    limits.job,
                    limits.tenant,
                    limits.server,
                    milliseconds(ttl_s + BACKSTOP_S),
                    job,
                    "" if submission.step is None else submission.step,
                    "" if reference is None else line_of(reference.name, reference.version),
                ],
            )
        if text(status) == "no_job":
            raise JobUnknown(f"job {job!r} does not exist any more", {"job": job})
        return SubmitStatus(text(status))

    async def get_super_batch(self, job: str, super_batch_id: str) -> SuperBatch | None:
        """See the port."""
        async with answering("queue"):
            held = await self._client.hgetall(self._keys.super_batch(job, super_batch_id))
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
            job=job,
            super_batch_id=super_batch_id,
            world_size=int(fields["world_size"]),
            reference=reference,
            created_at_s=float(fields["created_at"]),
            step=int(fields["step"]) if fields.get("step") else None,
            submissions=submissions,
            uploads=uploads,
            pending_shards=sum(name.startswith("shard:") for name in fields),
        )

    async def add_upload(
        self,
        job: str,
        super_batch_id: str,
        rank: int,
        *,
        digest: str,
        positions: tuple[int, ...],
        shards: Sequence[Shard],
        limits: Limits,
    ) -> UploadStatus:
        """See the port. The features are written first, so that no scorer ever finds a shard without them."""
        field = f"upload:{rank}:{digest}"
        super_batch = self._keys.super_batch(job, super_batch_id)
        features = {self._keys.features(job, super_batch_id, shard.shard_id): shard for shard in shards}
        async with answering("queue"):
            if await self._client.hexists(super_batch, field):
                return UploadStatus.REPEATED
        await self._write_features(features)
        async with answering("queue"):
            status = await self._add_upload(
                keys=[
                    super_batch,
                    self._keys.in_flight,
                    self._keys.queued,
                    self._keys.usage,
                    self._keys.lines,
                    *features,
                ],
                args=[
                    member(job, super_batch_id),
                    field,
                    json.dumps(positions),
                    job,
                    super_batch_id,
                    self._keys.prefix,
                    limits.job,
                    limits.tenant,
                    limits.server,
                    round(time.time() * 1000),
                    *_line_of(shards),
                    *(shard.shard_id for shard in features.values()),
                ],
            )
        if text(status) == "lost":
            raise StoreUnavailable("the queue lost the features of an upload before it was queued", retry_after_s=0.0)
        return UploadStatus(text(status))

    async def get_results(self, job: str, super_batch_id: str) -> list[ShardResult]:
        """See the port."""
        key = self._keys.results(job, super_batch_id)
        async with answering("queue"):
            shard_ids: list[Any] = await self._client.hkeys(key)
        results = []
        for batch in chunked(shard_ids, RESULT_BATCH):
            async with answering("queue"):
                held: list[Any] = await self._client.hmget(key, list(batch))
            results += [_unpack_result(blob) for blob in held if blob is not None]
        return results

    async def bytes_held(self, job: str) -> Limits:
        """See the port."""
        tenant = prefix_of(job)
        levels = (f"{job}/", tenant, "")
        async with answering("queue"):
            held: Any = await self._client.hmget(self._keys.usage, [f"bytes|{level}" for level in levels])
        found = [int(amount or 0) for amount in held]
        return Limits(job=found[0], tenant=found[1] if tenant else 0, server=found[2])

    async def _write_features(self, features: Mapping[str, Shard]) -> None:
        """Writes them for a short life, some MiB at a time; what is queued then lives on."""
        waiting: list[tuple[str, bytes]] = []
        for number, (key, shard) in enumerate(features.items(), start=1):
            waiting.append((key, pack_shard(shard)))
            if number == len(features) or sum(len(blob) for _, blob in waiting) >= WRITE_BATCH_BYTES:
                async with answering("queue"), self._client.pipeline(transaction=False) as pipe:
                    for name, blob in waiting:
                        pipe.set(name, blob, px=milliseconds(UNQUEUED_S))
                    await run(pipe)
                waiting.clear()


def _line_of(shards: Sequence[Shard]) -> tuple[str, str]:
    """The line of an upload's shards, which are all for one version of one model, and what it is for."""
    if not shards:
        return "", ""
    model, version = shards[0].reference_model, shards[0].reference_version
    return line_of(model, version), json.dumps({"model": model, "version": version})


def _unpack_result(blob: bytes) -> ShardResult:
    description, data = blobs.unpack(blob)
    return ShardResult(keys=tuple(description["keys"]), embeddings=bytes(data), inferred=description["inferred"])
