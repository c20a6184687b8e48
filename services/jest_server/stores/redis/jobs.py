"""Jobs, their counters, and the reference models that scorers announce, in Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from jest_server.domain.attempts import OpenResult, OpenStatus, attempt_name, attempt_number
from jest_server.domain.errors import JobUnknown
from jest_server.domain.jobs import Counters, Job, JobSpec
from jest_server.domain.ports import JobStore
from jest_server.domain.references import Announced, ReferenceInfo
from jest_server.stores.redis.connection import milliseconds, run, text, translate_redis_errors
from jest_server.stores.redis.references import versions_of

if TYPE_CHECKING:
    from jest_server.domain.attempts import AttemptRequest
    from jest_server.stores.redis.context import RedisContext

VERSION_KEPT_S = 86400.0
"""How long a version of a reference model is remembered that is not served any more."""
FINGERPRINT_KEPT_S = 30 * 86400.0
"""How long the fingerprints of a model are remembered after the last of them was used."""
ATTEMPT_MEMBERS_KEPT = 100_000
"""Processes and launches of a job that are remembered, the newest."""
DELETE_BATCH = 5000
"""Decisions that one step of a job's deletion deletes."""


class RedisJobStore(JobStore):
    """Jobs in hashes by name, and a hash of announced versions for each reference model."""

    def __init__(self, context: RedisContext) -> None:
        self._context = context
        self._client, self._keys = context.client, context.keys
        self._create_job = context.script("create_job")
        self._delete_job = context.script("fair_queue", "usage", "leave_flight", "delete_job")
        self._announce = context.script("announce")
        self._open_attempt = context.script("open_attempt")

    @override
    async def create_job(self, spec: JobSpec, *, now_s: float) -> tuple[Job, bool]:
        job = Job(spec=spec, created_at_s=now_s)
        async with translate_redis_errors("queue"):
            created, held = await self._create_job(
                self._keys.jobs, self._keys.weights, name=spec.name, weight=spec.weight, payload=job.model_dump_json()
            )
        return Job.model_validate_json(held), bool(created)

    @override
    async def get_job(self, name: str) -> Job | None:
        async with translate_redis_errors("queue"):
            held = await self._client.hget(self._keys.jobs, name)
        return None if held is None else Job.model_validate_json(held)

    @override
    async def list_jobs(self, *, after: str, limit: int) -> list[Job]:
        async with translate_redis_errors("queue"):
            names = sorted(text(name) for name in await self._client.hkeys(self._keys.jobs))
            page = [name for name in names if name > after][:limit]
            held = await self._client.hmget(self._keys.jobs, page) if page else []
        return [Job.model_validate_json(job) for job in held if job is not None]

    @override
    async def delete_job(self, name: str) -> bool:
        status, keys = "more", self._keys
        while status == "more":
            async with translate_redis_errors("queue"):
                answer = await self._delete_job(
                    keys.prefix,
                    keys.jobs,
                    keys.counters(name),
                    keys.dead_letters(name),
                    keys.dead_letter_order(name),
                    keys.decisions(name),
                    keys.in_flight,
                    keys.weights,
                    keys.model_queues,
                    keys.attempt(name),
                    keys.attempt_members(name),
                    job=name,
                    batch=DELETE_BATCH,
                )
            status = text(answer)
        return status == "deleted"

    @override
    async def counters(self, name: str) -> Counters:
        async with translate_redis_errors("queue"):
            held = await self._client.hgetall(self._keys.counters(name))
        return Counters.model_validate({text(field): int(value) for field, value in held.items()})

    @override
    async def open_attempt(self, request: AttemptRequest) -> OpenResult:
        async with translate_redis_errors("queue"):
            status, *current = await self._open_attempt(
                self._keys.jobs,
                self._keys.attempt(request.job),
                self._keys.attempt_members(request.job),
                job=request.job,
                rank=request.rank,
                world_size=request.world_size,
                launch=request.launch,
                nonce=request.process_nonce,
                parent=request.parent,
                parent_step="" if request.parent_step is None else request.parent_step,
                parent_number=attempt_number(request.parent),
                members_kept=ATTEMPT_MEMBERS_KEPT,
            )
        if status == b"no_job":
            raise JobUnknown(f"job {request.job!r} does not exist any more", {"job": request.job})
        number, opened_by, world_size, parent, step = (text(value or b"") for value in current)
        origin = (int(world_size or 0), parent, int(step) if step else None)
        return OpenResult(OpenStatus(text(status)), attempt_name(int(number or 0)), int(opened_by or 0), origin)

    @override
    async def announce_reference(self, info: ReferenceInfo, *, ttl_s: float) -> None:
        async with translate_redis_errors("queue"):
            await self._announce(
                self._keys.reference(info.name),
                self._keys.models,
                model=info.name,
                version=info.version,
                ttl_ms=milliseconds(ttl_s),
                kept_ms=milliseconds(VERSION_KEPT_S),
                payload=info.model_dump_json(),
            )

    @override
    async def record_fingerprint(self, info: ReferenceInfo, fingerprint: bytes) -> bytes:
        key = self._keys.fingerprints(info.name)
        async with translate_redis_errors("queue"), self._client.pipeline(transaction=False) as pipe:
            pipe.hsetnx(key, info.version, fingerprint)
            pipe.pexpire(key, milliseconds(FINGERPRINT_KEPT_S))
            pipe.hget(key, info.version)
            first = (await run(pipe))[-1]
        return fingerprint if first is None else bytes(first)

    @override
    async def get_reference(self, name: str) -> ReferenceInfo | None:
        served = [version for version in await versions_of(self._context, name) if version.served]
        return max(served, key=lambda version: version.since_ms).info if served else None

    @override
    async def list_references(self) -> list[Announced]:
        async with translate_redis_errors("queue"):
            names = sorted(text(name) for name in await self._client.smembers(self._keys.models))
        found = []
        for name in names:
            versions = await versions_of(self._context, name)
            if not versions:
                async with translate_redis_errors("queue"):
                    await self._client.srem(self._keys.models, name)
            versions.sort(key=lambda version: version.since_ms, reverse=True)
            found += [Announced(reference=v.info, since_s=v.since_ms / 1000, served=v.served) for v in versions]
        return found
