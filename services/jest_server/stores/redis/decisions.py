"""How super-batches leave flight, in Redis: decisions, dead letters, and requeued dead letters."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from jest_server.domain.attempts import attempt_name, attempt_number
from jest_server.domain.dead_letters import DeadLetter, RequeueStatus
from jest_server.domain.decisions import DECISIONS_KEPT, Decision
from jest_server.domain.errors import DeadLettered, SuperBatchUnknown
from jest_server.domain.ports import DecisionLog
from jest_server.domain.super_batches import SuperBatchRef
from jest_server.stores.redis.connection import milliseconds, run, text, translate_redis_errors
from jest_server.stores.redis.keys import BACKSTOP_S, queue_of, ref_of
from jest_server.stores.redis.references import REFERENCE, versions_of

if TYPE_CHECKING:
    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.super_batches import Limits
    from jest_server.stores.redis.context import RedisContext

DEAD_LETTERS_KEPT = 1000
DEAD_LETTERS_KEEP_S = 30 * 86400.0
INPUTS_KEPT = 100
INPUTS_KEEP_S = 86400.0
"""Of how many of a job's dead letters, and for how long, the inputs are kept."""
_SWEEP = 100


class RedisDecisionLog(DecisionLog):
    """One record of each decision with an index by its end, and dead letters in a hash for each job."""

    def __init__(self, context: RedisContext) -> None:
        self._context = context
        self._client, self._keys = context.client, context.keys
        self._decide = context.script("fair_queue", "usage", "leave_flight", "decide")
        self._dead_letter = context.script("fair_queue", "usage", "leave_flight", "dead_letter")
        self._requeue = context.script("usage", "requeue")

    @override
    async def decide(self, decision: Decision, *, keep_s: float, keep_count: int = DECISIONS_KEPT) -> Decision:
        ref = decision.ref
        increments = {
            "selected": 1,
            "in_flight": -1,
            "fallbacks": int(decision.fallback is not None),
            "examples_loaded": decision.super_batch_size,
            "examples_selected": decision.sub_batch_size,
            "cache_hits": decision.cache_hits,
            "reference_inferences": decision.reference_inferences,
        }
        async with translate_redis_errors("queue"):
            recorded = await self._decide(
                self._keys.prefix,
                self._keys.decision(ref),
                self._keys.decisions(ref.job),
                self._keys.dead_letters(ref.job),
                self._keys.counters(ref.job),
                self._keys.attempt(ref.job),
                **ref.metadata,
                attempt=attempt_number(ref.super_batch_id),
                keep_ms=milliseconds(keep_s),
                keep_count=keep_count,
                increments=increments,
                payload=decision.model_dump_json(),
            )
        if recorded == b"dead":
            raise DeadLettered(f"{ref} was dead-lettered", ref.metadata)
        if recorded == b"unknown":
            raise SuperBatchUnknown(f"{ref} is not in flight", ref.metadata)
        return Decision.model_validate_json(recorded)

    @override
    async def get_decision(self, ref: SuperBatchRef) -> Decision | None:
        async with translate_redis_errors("queue"):
            held = await self._client.get(self._keys.decision(ref))
        return None if held is None else Decision.model_validate_json(held)

    @override
    async def list_decisions(self, job: str, *, before: str, limit: int) -> tuple[list[Decision], str]:
        async with translate_redis_errors("queue"):
            indexed: Any = await self._client.zrange(self._keys.decisions(job), 0, -1, desc=True, withscores=True)
        found = sorted((_place(int(ends_ms), text(name)) for name, ends_ms in indexed), reverse=True)
        page = [place for place in found if not before or place < before][: limit + 1]
        names = [place.partition(":")[2] for place in page[:limit]]
        async with translate_redis_errors("queue"):
            held: Any = (
                await self._client.mget([self._keys.decision(SuperBatchRef(job, n)) for n in names]) if names else []
            )
        kept = [Decision.model_validate_json(record) for record in held if record is not None]
        return kept, page[limit - 1] if len(page) > limit else ""

    @override
    async def get_dead_letter(self, ref: SuperBatchRef) -> DeadLetter | None:
        async with translate_redis_errors("queue"):
            held = await self._client.hget(self._keys.dead_letters(ref.job), ref.super_batch_id)
        return None if held is None else DeadLetter.model_validate_json(held)

    @override
    async def list_dead_letters(self, job: str, *, limit: int) -> list[DeadLetter]:
        async with translate_redis_errors("queue"):
            ids: Any = await self._client.zrevrange(self._keys.dead_letter_order(job), 0, limit - 1) if limit else []
            held = await self._client.hmget(self._keys.dead_letters(job), ids) if ids else []
        return [DeadLetter.model_validate_json(letter) for letter in held if letter is not None]

    @override
    async def dead_letter(self, letter: DeadLetter) -> bool:
        ref = letter.ref
        async with translate_redis_errors("queue"):
            written = await self._dead_letter(
                self._keys.prefix,
                self._keys.dead_letters(ref.job),
                self._keys.dead_letter_order(ref.job),
                self._keys.counters(ref.job),
                self._keys.super_batch(ref),
                self._keys.kept_inputs(ref),
                **ref.metadata,
                at_s=letter.at_s,
                letters_kept=DEAD_LETTERS_KEPT,
                letters_ms=milliseconds(DEAD_LETTERS_KEEP_S),
                inputs_kept=INPUTS_KEPT,
                inputs_ms=milliseconds(INPUTS_KEEP_S),
                payload=letter.model_dump_json(),
            )
        return bool(written)

    @override
    async def drop_dead_letter(self, ref: SuperBatchRef) -> bool:
        async with translate_redis_errors("queue"), self._client.pipeline(transaction=True) as pipe:
            pipe.hdel(self._keys.dead_letters(ref.job), ref.super_batch_id)
            pipe.zrem(self._keys.dead_letter_order(ref.job), ref.super_batch_id)
            pipe.unlink(self._keys.kept_inputs(ref))
            return bool((await run(pipe))[0])

    @override
    async def requeue(
        self, ref: SuperBatchRef, reference: ReferenceInfo | None, *, limits: Limits, ttl_s: float, now_s: float
    ) -> RequeueStatus:
        async with translate_redis_errors("queue"):
            status = await self._requeue(
                self._keys.dead_letters(ref.job),
                self._keys.dead_letter_order(ref.job),
                self._keys.counters(ref.job),
                self._keys.super_batch(ref),
                self._keys.kept_inputs(ref),
                self._keys.in_flight,
                self._keys.usage,
                **ref.metadata,
                reference=REFERENCE.dump_json(reference).decode(),
                queue="" if reference is None else queue_of(reference.name, reference.version),
                now_s=now_s,
                deadline_s=now_s + ttl_s,
                ttl_ms=milliseconds(ttl_s + BACKSTOP_S),
                limits=asdict(limits),
            )
        return RequeueStatus(text(status))

    @override
    async def dead_letter_superseded(self, job: str, attempt: int, *, now_s: float) -> list[DeadLetter]:
        async with translate_redis_errors("queue"):
            members: Any = await self._client.zrange(self._keys.in_flight, 0, -1)
        letters = []
        for ref in map(ref_of, map(text, members)):
            if ref.job == job and 0 < attempt_number(ref.super_batch_id) < attempt:
                letter = DeadLetter.superseded(ref, attempt_name(attempt), at_s=now_s)
                if await self.dead_letter(letter):
                    letters.append(letter)
        return letters

    @override
    async def dead_letter_overdue(self, *, now_s: float) -> list[DeadLetter]:
        letters = []
        while overdue := await self._overdue(now_s):
            for ref in overdue:
                letter = DeadLetter.expired(ref, at_s=now_s)
                if await self.dead_letter(letter):
                    letters.append(letter)
        return letters

    @override
    async def dead_letter_unserved(self, *, grace_s: float, now_s: float) -> list[DeadLetter]:
        async with translate_redis_errors("queue"):
            queues: Any = await self._client.hgetall(self._keys.model_queues)
        letters = []
        for queue, model in queues.items():
            meant = json.loads(model)
            versions = await versions_of(self._context, meant["model"])
            own = [version for version in versions if version.info.version == meant["version"]]
            current = [version.info.version for version in versions if version.served]
            if not current or any(version.unserved_s < grace_s for version in own):
                continue
            for ref in await self._queued_in(text(queue)):
                letter = DeadLetter.unserved(ref, **meant, current=current, at_s=now_s)
                if await self.dead_letter(letter):
                    letters.append(letter)
            if not own:
                async with translate_redis_errors("queue"):
                    await self._client.hdel(self._keys.model_queues, queue)
        return letters

    async def _queued_in(self, queue: str) -> set[SuperBatchRef]:
        """Return the super-batches with shards that wait in a model queue or are being scored."""
        async with translate_redis_errors("queue"):
            jobs: Any = await self._client.zrange(self._keys.waiting_jobs(queue), 0, -1)
            claimed: Any = await self._client.zrange(self._keys.heartbeats(queue), 0, -1)
        found = {ref_of(text(shard)) for shard in claimed}
        for job in map(text, jobs):
            async with translate_redis_errors("queue"):
                waiting: Any = await self._client.zrange(self._keys.waiting(queue, job), 0, -1)
            found |= {ref_of(f"{job}/{text(shard)}") for shard in waiting}
        return found

    async def _overdue(self, now_s: float) -> list[SuperBatchRef]:
        async with translate_redis_errors("queue"):
            members: list[Any] = await self._client.zrange(
                self._keys.in_flight, "-inf", now_s, byscore=True, offset=0, num=_SWEEP
            )
        return [ref_of(text(member)) for member in members]


def _place(ends_ms: int, super_batch_id: str) -> str:
    """Where a decision is in the order of its job's: sorts as the pair does."""
    return f"{ends_ms:015d}:{super_batch_id}"
