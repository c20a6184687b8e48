"""SuperBatchStore on Redis 7 or Valkey. Every change of state is one Lua script; redis_keys tells what is where."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from jest_server import records
from jest_server.adapters.redis_connection import answering, milliseconds, run, script, text
from jest_server.adapters.redis_keys import DEFAULT_PREFIX, GROUP, line_of, member
from jest_server.adapters.redis_queue import RedisShardQueue, pack_shard
from jest_server.errors import DeadLettered, JobUnknown, StoreUnavailable, SuperBatchUnknown
from jest_server.model import (
    DECISIONS_KEPT,
    Announced,
    Counters,
    DeadLetter,
    Decision,
    Job,
    JobSpec,
    Limits,
    LineState,
    ReferenceInfo,
    RequeueStatus,
    ShardResult,
    Submission,
    SubmitStatus,
    SuperBatch,
    UploadStatus,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_server.model import Shard

BACKSTOP_S = 3600.0
"""How much longer than its super-batch anything may live."""
UNQUEUED_S = 120.0
"""How long features live that were written but never queued, because the writer died in between."""
VERSION_KEPT_S = 86400.0
"""How long a version of a reference model is remembered that is not served any more."""
LETTERS_KEPT = 1000
LETTERS_KEEP_S = 30 * 86400.0
SET_ASIDE_KEPT = 100
SET_ASIDE_KEEP_S = 86400.0
"""Of how many of a job's dead letters, and for how long, it is kept what was submitted."""
DELETE_BATCH = 5000
"""Decisions that one step of a job's deletion forgets."""
RESULT_BATCH = 32
"""Results that are read in one step."""
WRITE_BATCH_BYTES = 8 << 20
"""Features that are written in one step, or one shard's if they are more."""
_SWEEP = 100
_REFERENCE: TypeAdapter[ReferenceInfo | None] = TypeAdapter(ReferenceInfo | None)


class RedisSuperBatchStore(RedisShardQueue):
    """Jobs, super-batches and decisions; the queue of shards is in the base class."""

    def __init__(self, url: str, *, prefix: str = DEFAULT_PREFIX) -> None:
        super().__init__(url, prefix=prefix)
        self._create_job = script(self._client, "create_job")
        self._announce = script(self._client, "announce")
        self._submit = script(self._client, "usage", "submit")
        self._add_upload = script(self._client, "turns", "usage", "add_upload")
        self._decide = script(self._client, "turns", "usage", "let_go", "decide")
        self._dead_letter = script(self._client, "turns", "usage", "let_go", "dead_letter")
        self._requeue = script(self._client, "usage", "requeue")
        self._delete_job = script(self._client, "turns", "usage", "let_go", "delete_job")

    @classmethod
    def from_url(cls, url: str, *, prefix: str = DEFAULT_PREFIX) -> RedisSuperBatchStore:
        """Connects lazily. All keys start with ``prefix``, which holds a hash tag.

        Raises:
            ValueError: If ``url`` or ``prefix`` cannot be; a URL is not repeated in the message.
        """
        return cls(url, prefix=prefix)

    # Jobs

    async def create_job(self, spec: JobSpec, *, now_s: float) -> tuple[Job, bool]:
        """See the port."""
        job = Job(spec=spec, created_at_s=now_s)
        async with answering("queue"):
            created, held = await self._create_job(
                keys=[self._keys.jobs, self._keys.weights], args=[spec.name, job.model_dump_json(), spec.weight]
            )
        return Job.model_validate_json(held), bool(created)

    async def get_job(self, name: str) -> Job | None:
        """See the port."""
        async with answering("queue"):
            held = await self._client.hget(self._keys.jobs, name)
        return None if held is None else Job.model_validate_json(held)

    async def list_jobs(self, *, after: str, limit: int) -> list[Job]:
        """See the port."""
        async with answering("queue"):
            names = sorted(text(name) for name in await self._client.hkeys(self._keys.jobs))
            page = [name for name in names if name > after][:limit]
            held = await self._client.hmget(self._keys.jobs, page) if page else []
        return [Job.model_validate_json(job) for job in held if job is not None]

    async def delete_job(self, name: str) -> bool:
        """See the port."""
        status = "more"
        while status == "more":
            async with answering("queue"):
                answer = await self._delete_job(
                    keys=[
                        self._keys.jobs,
                        self._keys.counters(name),
                        self._keys.dead(name),
                        self._keys.dead_order(name),
                        self._keys.decided(name),
                        self._keys.in_flight,
                        self._keys.weights,
                        self._keys.lines,
                    ],
                    args=[name, DELETE_BATCH, GROUP, self._keys.prefix],
                )
            status = text(answer)
        return status == "deleted"

    async def counters(self, name: str) -> Counters:
        """See the port."""
        async with answering("queue"):
            held = await self._client.hgetall(self._keys.counters(name))
        return Counters.model_validate({text(field): int(value) for field, value in held.items()})

    # Reference models

    async def announce_reference(self, info: ReferenceInfo, *, ttl_s: float) -> None:
        """See the port."""
        async with answering("queue"):
            await self._announce(
                keys=[self._keys.reference(info.name), self._keys.models],
                args=[
                    info.version,
                    info.model_dump_json(),
                    milliseconds(ttl_s),
                    milliseconds(VERSION_KEPT_S),
                    info.name,
                ],
            )

    async def get_reference(self, name: str) -> ReferenceInfo | None:
        """See the port."""
        served = [version for version in await self._versions(name) if version.served]
        return max(served, key=lambda version: version.since_ms).info if served else None

    async def list_references(self) -> list[Announced]:
        """See the port."""
        async with answering("queue"):
            names = sorted(text(name) for name in await self._client.smembers(self._keys.models))
        found = []
        for name in names:
            versions = await self._versions(name)
            if not versions:
                async with answering("queue"):
                    await self._client.srem(self._keys.models, name)
            versions.sort(key=lambda version: version.since_ms, reverse=True)
            found += [Announced(reference=v.info, since_s=v.since_ms / 1000, served=v.served) for v in versions]
        return found

    async def _versions(self, name: str) -> list[_Version]:
        """All versions of a model that are remembered."""
        async with answering("queue"), self._client.pipeline(transaction=False) as pipe:
            pipe.hvals(self._keys.reference(name))
            pipe.time()
            held, (seconds, microseconds) = await run(pipe)
        now_ms = seconds * 1000 + microseconds // 1000
        return [_Version.of(json.loads(record), now_ms) for record in held]

    # Super-batches

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
                    _REFERENCE.dump_json(reference),
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
        reference = _REFERENCE.validate_json(fields["reference"])
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

    async def get_dead_letter(self, job: str, super_batch_id: str) -> DeadLetter | None:
        """See the port."""
        async with answering("queue"):
            held = await self._client.hget(self._keys.dead(job), super_batch_id)
        return None if held is None else DeadLetter.model_validate_json(held)

    async def list_dead_letters(self, job: str, *, limit: int) -> list[DeadLetter]:
        """See the port."""
        async with answering("queue"):
            ids: Any = await self._client.zrevrange(self._keys.dead_order(job), 0, limit - 1) if limit else []
            held = await self._client.hmget(self._keys.dead(job), ids) if ids else []
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
        for start in range(0, len(shard_ids), RESULT_BATCH):
            async with answering("queue"):
                held: list[Any] = await self._client.hmget(key, shard_ids[start : start + RESULT_BATCH])
            results += [_unpack_result(blob) for blob in held if blob is not None]
        return results

    async def decide(self, decision: Decision, *, keep_s: float, keep_count: int = DECISIONS_KEPT) -> Decision:
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
        async with answering("queue"):
            recorded = await self._decide(
                keys=[
                    self._keys.decision(job, super_batch_id),
                    self._keys.decided(job),
                    self._keys.dead(job),
                    self._keys.counters(job),
                ],
                args=[
                    job,
                    super_batch_id,
                    decision.model_dump_json(),
                    milliseconds(keep_s),
                    GROUP,
                    self._keys.prefix,
                    keep_count,
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
        async with answering("queue"):
            held = await self._client.get(self._keys.decision(job, super_batch_id))
        return None if held is None else Decision.model_validate_json(held)

    async def list_decisions(self, job: str, *, before: str, limit: int) -> tuple[list[Decision], str]:
        """See the port."""
        async with answering("queue"):
            indexed: Any = await self._client.zrange(self._keys.decided(job), 0, -1, desc=True, withscores=True)
        found = sorted((_place(int(ends_ms), text(name)) for name, ends_ms in indexed), reverse=True)
        page = [place for place in found if not before or place < before][: limit + 1]
        names = [place.partition(":")[2] for place in page[:limit]]
        async with answering("queue"):
            held: Any = await self._client.mget([self._keys.decision(job, n) for n in names]) if names else []
        kept = [Decision.model_validate_json(record) for record in held if record is not None]
        return kept, page[limit - 1] if len(page) > limit else ""

    async def lines(self) -> list[LineState]:
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
                found.append(LineState(**held, waiting=counts, scoring=scoring))
        return sorted(found, key=lambda line: (line.model, line.version))

    async def dead_letter(self, letter: DeadLetter) -> bool:
        """See the port."""
        job, super_batch_id = letter.job, letter.super_batch_id
        async with answering("queue"):
            return bool(
                await self._dead_letter(
                    keys=[
                        self._keys.dead(job),
                        self._keys.dead_order(job),
                        self._keys.counters(job),
                        self._keys.super_batch(job, super_batch_id),
                        self._keys.set_aside(job, super_batch_id),
                    ],
                    args=[
                        job,
                        super_batch_id,
                        letter.model_dump_json(),
                        letter.at_s,
                        LETTERS_KEPT,
                        milliseconds(LETTERS_KEEP_S),
                        GROUP,
                        self._keys.prefix,
                        SET_ASIDE_KEPT,
                        milliseconds(SET_ASIDE_KEEP_S),
                    ],
                )
            )

    async def drop_dead_letter(self, job: str, super_batch_id: str) -> bool:
        """See the port."""
        async with answering("queue"), self._client.pipeline(transaction=True) as pipe:
            pipe.hdel(self._keys.dead(job), super_batch_id)
            pipe.zrem(self._keys.dead_order(job), super_batch_id)
            pipe.unlink(self._keys.set_aside(job, super_batch_id))
            return bool((await run(pipe))[0])

    async def requeue(
        self,
        job: str,
        super_batch_id: str,
        reference: ReferenceInfo | None,
        *,
        limits: Limits,
        ttl_s: float,
        now_s: float,
    ) -> RequeueStatus:
        """See the port."""
        async with answering("queue"):
            status = await self._requeue(
                keys=[
                    self._keys.dead(job),
                    self._keys.dead_order(job),
                    self._keys.counters(job),
                    self._keys.super_batch(job, super_batch_id),
                    self._keys.set_aside(job, super_batch_id),
                    self._keys.in_flight,
                    self._keys.usage,
                ],
                args=[
                    job,
                    super_batch_id,
                    now_s,
                    now_s + ttl_s,
                    limits.job,
                    limits.tenant,
                    limits.server,
                    milliseconds(ttl_s + BACKSTOP_S),
                    _REFERENCE.dump_json(reference),
                    "" if reference is None else line_of(reference.name, reference.version),
                ],
            )
        return RequeueStatus(text(status))

    async def bytes_held(self, job: str) -> Limits:
        """See the port."""
        tenant, separator, _ = job.rpartition("~")
        levels = (f"{job}/", tenant + separator, "")
        async with answering("queue"):
            held: Any = await self._client.hmget(self._keys.usage, [f"bytes|{level}" for level in levels])
        found = [int(amount or 0) for amount in held]
        return Limits(job=found[0], tenant=found[1] if tenant else 0, server=found[2])

    async def dead_letter_unserved(self, *, grace_s: float, now_s: float) -> list[DeadLetter]:
        """See the port."""
        async with answering("queue"):
            lines: Any = await self._client.hgetall(self._keys.lines)
        letters = []
        for line, held in lines.items():
            meant = json.loads(held)
            versions = await self._versions(meant["model"])
            own = [version for version in versions if version.info.version == meant["version"]]
            current = [version.info.version for version in versions if version.served]
            if not current or any(version.unserved_s < grace_s for version in own):
                continue
            for job, super_batch_id in await self._in_line(text(line)):
                letter = DeadLetter.unserved(job, super_batch_id, **meant, current=current, at_s=now_s)
                if await self.dead_letter(letter):
                    letters.append(letter)
            if not own:
                async with answering("queue"):
                    await self._client.hdel(self._keys.lines, line)
        return letters

    async def _in_line(self, line: str) -> set[tuple[str, str]]:
        """Super-batches with shards that wait in a line or are being scored."""
        async with answering("queue"):
            jobs: Any = await self._client.zrange(self._keys.turns(line), 0, -1)
            taken: Any = await self._client.xrange(self._keys.shards(line))
        found = {(text(fields[b"job"]), text(fields[b"id"])) for _, fields in taken}
        for job in map(text, jobs):
            async with answering("queue"):
                shards: Any = await self._client.zrange(self._keys.waiting(line, job), 0, -1)
            found |= {(job, text(shard).partition("/")[0]) for shard in shards}
        return found

    async def dead_letter_overdue(self, *, now_s: float) -> list[DeadLetter]:
        """See the port."""
        letters = []
        while overdue := await self._overdue(now_s):
            for job, super_batch_id in overdue:
                letter = DeadLetter.expired(job, super_batch_id, at_s=now_s)
                if await self.dead_letter(letter):
                    letters.append(letter)
        return letters

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

    async def _overdue(self, now_s: float) -> list[tuple[str, str]]:
        async with answering("queue"):
            members: list[Any] = await self._client.zrange(
                self._keys.in_flight, "-inf", now_s, byscore=True, offset=0, num=_SWEEP
            )
        parts = (text(found).partition("/") for found in members)
        return [(job, super_batch_id) for job, _, super_batch_id in parts]


def _place(ends_ms: int, super_batch_id: str) -> str:
    """Where a decision is in the order of its job's: sorts as the pair does."""
    return f"{ends_ms:015d}:{super_batch_id}"


@dataclass(frozen=True)
class _Version:
    """A version of a reference model, as scorers announced it."""

    info: ReferenceInfo
    since_ms: int
    unserved_s: float
    """How long ago the last announcement ran out; negative while it holds."""

    @property
    def served(self) -> bool:
        return self.unserved_s < 0

    @classmethod
    def of(cls, record: Mapping[str, Any], now_ms: int) -> _Version:
        info = ReferenceInfo.model_validate_json(record["info"])
        return cls(info, int(record["since_ms"]), (now_ms - record["until_ms"]) / 1000)


def _line_of(shards: Sequence[Shard]) -> tuple[str, str]:
    """The line of an upload's shards, which are all for one version of one model, and what it is for."""
    if not shards:
        return "", ""
    model, version = shards[0].reference_model, shards[0].reference_version
    return line_of(model, version), json.dumps({"model": model, "version": version})


def _unpack_result(blob: bytes) -> ShardResult:
    description, data = records.unpack(blob)
    return ShardResult(keys=tuple(description["keys"]), embeddings=bytes(data), inferred=description["inferred"])
