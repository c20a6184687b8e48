"""What becomes of super-batches, in Redis: decisions, dead letters, and dead letters in flight again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from jest_server.domain.dead_letters import DeadLetter, RequeueStatus
from jest_server.domain.decisions import DECISIONS_KEPT, Decision
from jest_server.domain.errors import DeadLettered, SuperBatchUnknown
from jest_server.domain.references import ReferenceInfo
from jest_server.stores.redis.connection import answering, milliseconds, run, script, text
from jest_server.stores.redis.jobs import RedisRegistry
from jest_server.stores.redis.keys import DEFAULT_PREFIX, GROUP, line_of

if TYPE_CHECKING:
    from jest_server.domain.super_batches import Limits

BACKSTOP_S = 3600.0
"""How much longer than its super-batch anything may live."""
LETTERS_KEPT = 1000
LETTERS_KEEP_S = 30 * 86400.0
SET_ASIDE_KEPT = 100
SET_ASIDE_KEEP_S = 86400.0
"""Of how many of a job's dead letters, and for how long, it is kept what was submitted."""
_SWEEP = 100
REFERENCE: TypeAdapter[ReferenceInfo | None] = TypeAdapter(ReferenceInfo | None)


class RedisOutcomes(RedisRegistry):
    """How super-batches leave flight, and what is kept of them."""

    def __init__(self, url: str, *, prefix: str = DEFAULT_PREFIX) -> None:
        super().__init__(url, prefix=prefix)
        self._decide = script(self._client, "turns", "usage", "let_go", "decide")
        self._dead_letter = script(self._client, "turns", "usage", "let_go", "dead_letter")
        self._requeue = script(self._client, "usage", "requeue")

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
                    REFERENCE.dump_json(reference),
                    "" if reference is None else line_of(reference.name, reference.version),
                ],
            )
        return RequeueStatus(text(status))

    async def dead_letter_overdue(self, *, now_s: float) -> list[DeadLetter]:
        """See the port."""
        letters = []
        while overdue := await self._overdue(now_s):
            for job, super_batch_id in overdue:
                letter = DeadLetter.expired(job, super_batch_id, at_s=now_s)
                if await self.dead_letter(letter):
                    letters.append(letter)
        return letters

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
