"""Jobs, their accounts, and the reference models that scorers serve, in Redis."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jest_server.domain.jobs import Counters, Job, JobSpec
from jest_server.domain.references import Announced, ReferenceInfo
from jest_server.stores.redis.connection import answering, milliseconds, run, script, text
from jest_server.stores.redis.keys import DEFAULT_PREFIX, GROUP
from jest_server.stores.redis.shard_queue import RedisShardQueue

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION_KEPT_S = 86400.0
"""How long a version of a reference model is remembered that is not served any more."""
DELETE_BATCH = 5000
"""Decisions that one step of a job's deletion forgets."""


class RedisRegistry(RedisShardQueue):
    """What is registered and announced; the queue of shards is in the base class."""

    def __init__(self, url: str, *, prefix: str = DEFAULT_PREFIX) -> None:
        super().__init__(url, prefix=prefix)
        self._create_job = script(self._client, "create_job")
        self._delete_job = script(self._client, "turns", "usage", "let_go", "delete_job")
        self._announce = script(self._client, "announce")

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
