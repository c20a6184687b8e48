"""SuperBatchStore on Redis 7 or Valkey. Every change of state is one Lua script; redis_keys tells what is where."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from jest_server import records
from jest_server.adapters import redis_keys as keys
from jest_server.adapters.redis_connection import answering, connect, script, text
from jest_server.adapters.redis_queue import RedisShardQueue
from jest_server.errors import DeadLettered, SuperBatchUnknown
from jest_server.model import (
    Counters,
    DeadLetter,
    Decision,
    Job,
    JobSpec,
    ReferenceInfo,
    ShardResult,
    Submission,
    SubmitStatus,
    SuperBatch,
    UploadStatus,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio import Redis

    from jest_server.model import Shard

BACKSTOP_S = 3600.0
"""How much longer than its super-batch anything may live."""
LETTERS_KEPT = 1000
LETTERS_KEEP_S = 30 * 86400
_SWEEP = 100
_SCAN = 500


class RedisSuperBatchStore(RedisShardQueue):
    """Jobs, super-batches and decisions; the queue of shards is in the base class."""

    def __init__(self, client: Redis, blocking: Redis) -> None:
        super().__init__(client, blocking)
        self._submit = script(client, "submit")
        self._add_upload = script(client, "add_upload")
        self._decide = script(client, "decide")
        self._dead_letter = script(client, "dead_letter")

    @classmethod
    def from_url(cls, url: str) -> RedisSuperBatchStore:
        """Connects lazily; blocking reads get connections of their own."""
        return cls(connect(url), connect(url, blocking_s=30.0))

    # Jobs

    async def create_job(self, spec: JobSpec, *, now_s: float) -> tuple[Job, bool]:
        """See the port."""
        job = Job(spec=spec, created_at_s=now_s)
        with answering("queue"):
            created = bool(await self._client.hsetnx(keys.JOBS, spec.name, job.model_dump_json()))
            held = await self._client.hget(keys.JOBS, spec.name)
        return (job if held is None else Job.model_validate_json(held)), created

    async def get_job(self, name: str) -> Job | None:
        """See the port."""
        with answering("queue"):
            held = await self._client.hget(keys.JOBS, name)
        return None if held is None else Job.model_validate_json(held)

    async def list_jobs(self, *, after: str, limit: int) -> list[Job]:
        """See the port."""
        with answering("queue"):
            names = sorted(text(name) for name in await self._client.hkeys(keys.JOBS))
            page = [name for name in names if name > after][:limit]
            held = await self._client.hmget(keys.JOBS, page) if page else []
        return [Job.model_validate_json(job) for job in held if job is not None]

    async def delete_job(self, name: str) -> bool:
        """See the port."""
        with answering("queue"):
            deleted = bool(await self._client.hdel(keys.JOBS, name))
            async for member, _ in self._client.zscan_iter(keys.IN_FLIGHT, match=f"{name}/*", count=_SCAN):
                await self._client.zrem(keys.IN_FLIGHT, member)
            for kind in ("super_batch", "features", "results", "decision"):
                pattern = f"{keys.PREFIX}{kind}:{name}/*"
                async for key in self._client.scan_iter(pattern, count=_SCAN):
                    await self._client.unlink(key)
            await self._client.unlink(keys.counters(name), keys.dead(name), keys.dead_order(name))
        return deleted

    async def counters(self, name: str) -> Counters:
        """See the port."""
        with answering("queue"):
            held = await self._client.hgetall(keys.counters(name))
        return Counters.model_validate({text(field): int(value) for field, value in held.items()})

    # Reference models

    async def announce_reference(self, info: ReferenceInfo, *, ttl_s: float) -> None:
        """See the port."""
        with answering("queue"):
            await self._client.set(keys.reference(info.name), info.model_dump_json(), px=_ms(ttl_s))

    async def get_reference(self, name: str) -> ReferenceInfo | None:
        """See the port."""
        with answering("queue"):
            held = await self._client.get(keys.reference(name))
        return None if held is None else ReferenceInfo.model_validate_json(held)

    # Super-batches

    async def submit(self, submission: Submission, *, max_in_flight: int, ttl_s: float, now_s: float) -> SubmitStatus:
        """See the port."""
        job, super_batch_id = submission.job, submission.super_batch_id
        with answering("queue"):
            status = await self._submit(
                keys=[
                    keys.super_batch(job, super_batch_id),
                    keys.decision(job, super_batch_id),
                    keys.dead(job),
                    keys.IN_FLIGHT,
                    keys.counters(job),
                ],
                args=[
                    keys.member(job, super_batch_id),
                    super_batch_id,
                    submission.rank,
                    submission.digest,
                    submission.model_dump_json(exclude={"reference"}),
                    submission.world_size,
                    submission.reference.model_dump_json(),
                    now_s,
                    now_s + ttl_s,
                    max_in_flight,
                    _ms(ttl_s + BACKSTOP_S),
                ],
            )
        return SubmitStatus(text(status))

    async def get_super_batch(self, job: str, super_batch_id: str) -> SuperBatch | None:
        """See the port."""
        with answering("queue"):
            held = await self._client.hgetall(keys.super_batch(job, super_batch_id))
        if not held:
            return None
        fields = {text(name): value for name, value in held.items()}
        reference = ReferenceInfo.model_validate_json(fields["reference"])
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
            submissions=submissions,
            uploads=uploads,
            pending_shards=int(fields["pending"]),
        )

    async def get_dead_letter(self, job: str, super_batch_id: str) -> DeadLetter | None:
        """See the port."""
        with answering("queue"):
            held = await self._client.hget(keys.dead(job), super_batch_id)
        return None if held is None else DeadLetter.model_validate_json(held)

    async def list_dead_letters(self, job: str, *, limit: int) -> list[DeadLetter]:
        """See the port."""
        with answering("queue"):
            ids: Any = await self._client.zrevrange(keys.dead_order(job), 0, limit - 1) if limit else []
            held = await self._client.hmget(keys.dead(job), ids) if ids else []
        return [DeadLetter.model_validate_json(letter) for letter in held if letter is not None]

    async def add_upload(
        self,
        job: str,
        super_batch_id: str,
        rank: int,
        *,
        digest: str,
        positions: tuple[int, ...],
        shards: Sequence[Shard],
    ) -> UploadStatus:
        """See the port. The features are written first, so that no scorer ever finds a shard without them."""
        field = f"upload:{rank}:{digest}"
        super_batch = keys.super_batch(job, super_batch_id)
        with answering("queue"):
            if await self._client.hexists(super_batch, field):
                return UploadStatus.REPEATED
            lives_ms = max(await self._client.pttl(super_batch), _ms(BACKSTOP_S))
            async with self._client.pipeline(transaction=False) as pipe:
                for shard in shards:
                    pipe.set(keys.features(job, super_batch_id, shard.shard_id), _pack_shard(shard), px=lives_ms)
                await pipe.execute()
            status = await self._add_upload(
                keys=[super_batch, keys.IN_FLIGHT, keys.SHARDS],
                args=[
                    keys.member(job, super_batch_id),
                    field,
                    json.dumps(positions),
                    lives_ms,
                    job,
                    super_batch_id,
                    *(shard.shard_id for shard in shards),
                ],
            )
            if text(status) == UploadStatus.GONE.value:
                await self._client.unlink(*(keys.features(job, super_batch_id, shard.shard_id) for shard in shards))
        return UploadStatus(text(status))

    async def get_results(self, job: str, super_batch_id: str) -> list[ShardResult]:
        """See the port."""
        with answering("queue"):
            held: list[Any] = await self._client.hvals(keys.results(job, super_batch_id))
        return [_unpack_result(blob) for blob in held]

    async def decide(self, decision: Decision, *, keep_s: float) -> Decision:
        """See the port."""
        job, super_batch_id = decision.job, decision.super_batch_id
        increments = {
            "selected": 1,
            "in_flight": -1,
            "fallbacks": int(decision.fallback is not None),
            "examples_loaded": decision.super_batch_size,
            "examples_selected": decision.sub_batch_size,
            "cache_hits": decision.cache_hits,
            "reference_inferences": decision.reference_inferences,
        }
        with answering("queue"):
            recorded = await self._decide(
                keys=[
                    keys.decision(job, super_batch_id),
                    keys.super_batch(job, super_batch_id),
                    keys.dead(job),
                    keys.IN_FLIGHT,
                    keys.counters(job),
                    keys.results(job, super_batch_id),
                    keys.NEWS,
                ],
                args=[
                    keys.member(job, super_batch_id),
                    super_batch_id,
                    decision.model_dump_json(),
                    _ms(keep_s),
                    job,
                    keys.features(job, super_batch_id, ""),
                    *(part for pair in increments.items() for part in pair),
                ],
            )
        context = {"job": job, "super_batch_id": super_batch_id}
        if recorded == b"dead":
            raise DeadLettered(f"super-batch {super_batch_id!r} of job {job!r} was set aside", context)
        if recorded == b"unknown":
            raise SuperBatchUnknown(f"super-batch {super_batch_id!r} of job {job!r} is not in flight", context)
        return Decision.model_validate_json(recorded)

    async def get_decision(self, job: str, super_batch_id: str) -> Decision | None:
        """See the port."""
        with answering("queue"):
            held = await self._client.get(keys.decision(job, super_batch_id))
        return None if held is None else Decision.model_validate_json(held)

    async def dead_letter(self, letter: DeadLetter) -> bool:
        """See the port."""
        job, super_batch_id = letter.job, letter.super_batch_id
        with answering("queue"):
            return bool(
                await self._dead_letter(
                    keys=[
                        keys.super_batch(job, super_batch_id),
                        keys.dead(job),
                        keys.dead_order(job),
                        keys.IN_FLIGHT,
                        keys.counters(job),
                        keys.results(job, super_batch_id),
                        keys.NEWS,
                    ],
                    args=[
                        keys.member(job, super_batch_id),
                        super_batch_id,
                        letter.model_dump_json(),
                        letter.at_s,
                        LETTERS_KEPT,
                        job,
                        keys.features(job, super_batch_id, ""),
                        _ms(LETTERS_KEEP_S),
                    ],
                )
            )

    async def dead_letter_overdue(self, *, now_s: float) -> list[DeadLetter]:
        """See the port."""
        with answering("queue"):
            overdue: list[Any] = await self._client.zrange(
                keys.IN_FLIGHT, "-inf", now_s, byscore=True, offset=0, num=_SWEEP
            )
        letters = []
        for member in overdue:
            job, _, super_batch_id = text(member).partition("/")
            letter = DeadLetter(
                job=job,
                super_batch_id=super_batch_id,
                reason="EXPIRED",
                detail="no decision within the job's super_batch_ttl",
                at_s=now_s,
            )
            if await self.dead_letter(letter):
                letters.append(letter)
        return letters


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _pack_shard(shard: Shard) -> bytes:
    description = {"model": shard.reference_model, "version": shard.reference_version, "keys": shard.keys}
    return records.pack(description, shard.features)


def _unpack_result(blob: bytes) -> ShardResult:
    description, data = records.unpack(blob)
    return ShardResult(keys=tuple(description["keys"]), embeddings=bytes(data), inferred=description["inferred"])
