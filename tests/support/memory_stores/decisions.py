"""How super-batches leave flight, in this process's memory: decisions, dead letters, and requeued dead letters."""

from __future__ import annotations

import heapq
import time
from typing import TYPE_CHECKING

from typing_extensions import override

from jest_server.domain.attempts import attempt_name, attempt_number
from jest_server.domain.dead_letters import DeadLetter, RequeueStatus
from jest_server.domain.decisions import DECISIONS_KEPT
from jest_server.domain.errors import DeadLettered, SuperBatchUnknown
from jest_server.domain.ports import DecisionLog
from jest_server.domain.super_batches import SuperBatchRef
from support.memory_stores.state import InFlight

if TYPE_CHECKING:
    from jest_server.domain.decisions import Decision
    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.super_batches import Limits
    from support.memory_stores.state import MemoryState

DEAD_LETTERS_KEPT = 1000
INPUTS_KEPT = 100


class MemoryDecisionLog(DecisionLog):
    """Decisions and dead letters in dictionaries of each job."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state

    @override
    async def decide(self, decision: Decision, *, keep_s: float, keep_count: int = DECISIONS_KEPT) -> Decision:
        ref, super_batch_id = decision.ref, decision.super_batch_id
        recorded = await self.get_decision(ref)
        if recorded is not None:
            return recorded
        state = self._state.jobs.get(ref.job)
        if state is not None and super_batch_id in state.dead_letters:
            raise DeadLettered(f"{ref} was dead-lettered", ref.metadata)
        if state is None or super_batch_id not in state.in_flight:
            raise SuperBatchUnknown(f"{ref} is not in flight", ref.metadata)
        until = time.monotonic() + keep_s
        state.decisions[super_batch_id] = (decision, until)
        if attempt_number(super_batch_id) == state.attempts.number:
            state.attempts.current.decided = True
        heapq.heappush(state.ends, (until, super_batch_id))
        while len(state.ends) > keep_count:
            del state.decisions[heapq.heappop(state.ends)[1]]
        state.add(
            selected=1,
            in_flight=-1,
            fallbacks=int(decision.fallback is not None),
            examples_loaded=decision.super_batch_size,
            examples_selected=decision.sub_batch_size,
            cache_hits=decision.cache_hits,
            reference_inferences=decision.reference_inferences,
        )
        self._state.leave_flight(state, super_batch_id)
        return decision

    @override
    async def get_decision(self, ref: SuperBatchRef) -> Decision | None:
        state = self._state.jobs.get(ref.job)
        if state is None:
            return None
        state.expire_decisions()
        decision, _ = state.decisions.get(ref.super_batch_id, (None, 0.0))
        return decision

    @override
    async def list_decisions(self, job: str, *, before: str, limit: int) -> tuple[list[Decision], str]:
        state = self._state.jobs.get(job)
        if state is None:
            return [], ""
        state.expire_decisions()
        found = sorted((f"{until:020.6f}:{name}" for name, (_, until) in state.decisions.items()), reverse=True)
        page = [place for place in found if not before or place < before][: limit + 1]
        decisions = [state.decisions[place.partition(":")[2]][0] for place in page[:limit]]
        return decisions, page[limit - 1] if len(page) > limit else ""

    @override
    async def get_dead_letter(self, ref: SuperBatchRef) -> DeadLetter | None:
        state = self._state.jobs.get(ref.job)
        return None if state is None else state.dead_letters.get(ref.super_batch_id)

    @override
    async def list_dead_letters(self, job: str, *, limit: int) -> list[DeadLetter]:
        state = self._state.jobs.get(job)
        letters = [] if state is None else list(state.dead_letters.values())
        return sorted(letters, key=lambda letter: (letter.at_s, letter.super_batch_id), reverse=True)[:limit]

    @override
    async def dead_letter(self, letter: DeadLetter) -> bool:
        state = self._state.jobs.get(letter.job)
        if state is None or letter.super_batch_id not in state.in_flight:
            return False
        state.add(dead_lettered=1, in_flight=-1)
        state.dead_letters[letter.super_batch_id] = letter
        state.kept_inputs[letter.super_batch_id] = state.in_flight[letter.super_batch_id]
        self._state.leave_flight(state, letter.super_batch_id)
        while len(state.kept_inputs) > INPUTS_KEPT:
            del state.kept_inputs[state.oldest_dead_letter(state.kept_inputs)]
        while len(state.dead_letters) > DEAD_LETTERS_KEPT:
            del state.dead_letters[state.oldest_dead_letter(state.dead_letters)]
        return True

    @override
    async def drop_dead_letter(self, ref: SuperBatchRef) -> bool:
        state, super_batch_id = self._state.jobs.get(ref.job), ref.super_batch_id
        if state is None or super_batch_id not in state.dead_letters:
            return False
        state.kept_inputs.pop(super_batch_id, None)
        del state.dead_letters[super_batch_id]
        return True

    @override
    async def requeue(
        self, ref: SuperBatchRef, reference: ReferenceInfo | None, *, limits: Limits, ttl_s: float, now_s: float
    ) -> RequeueStatus:
        state, super_batch_id = self._state.jobs.get(ref.job), ref.super_batch_id
        if state is None or super_batch_id not in state.dead_letters:
            return RequeueStatus.NO_LETTER
        if super_batch_id not in state.kept_inputs:
            return RequeueStatus.FORGOTTEN
        full = limits.first_exceeded(self._state.sums(ref.job, lambda _: 1), more=1)
        if full is not None:
            return RequeueStatus(full)
        before = state.kept_inputs.pop(super_batch_id)
        del state.dead_letters[super_batch_id]
        held = InFlight(reference, before.world_size, before.step, now_s, now_s + ttl_s)
        held.submissions = {
            rank: submission.model_copy(update={"reference": reference})
            for rank, submission in before.submissions.items()
        }
        state.in_flight[super_batch_id] = held
        state.add(dead_lettered=-1, in_flight=1)
        return RequeueStatus.REQUEUED

    @override
    async def dead_letter_superseded(self, job: str, attempt: int, *, now_s: float) -> list[DeadLetter]:
        state = self._state.jobs.get(job)
        ids = [] if state is None else [i for i in state.in_flight if 0 < attempt_number(i) < attempt]
        letters = [DeadLetter.superseded(SuperBatchRef(job, i), attempt_name(attempt), at_s=now_s) for i in ids]
        return [letter for letter in letters if await self.dead_letter(letter)]

    @override
    async def dead_letter_overdue(self, *, now_s: float) -> list[DeadLetter]:
        letters = [
            DeadLetter.expired(SuperBatchRef(job, super_batch_id), at_s=now_s)
            for job, state in self._state.jobs.items()
            for super_batch_id, held in state.in_flight.items()
            if held.deadline_s <= now_s
        ]
        return [letter for letter in letters if await self.dead_letter(letter)]

    @override
    async def dead_letter_unserved(self, *, grace_s: float, now_s: float) -> list[DeadLetter]:
        letters = []
        for queued in list(self._state.queued.values()):
            model, version = queued.version
            current = [k.info.version for k in self._state.references.values() if k.info.name == model and k.served]
            own = self._state.references.get(queued.version)
            if current and (own is None or own.until + grace_s <= time.monotonic()):
                letters.append(
                    DeadLetter.unserved(queued.shard.ref, model=model, version=version, current=current, at_s=now_s)
                )
        return [letter for letter in letters if await self.dead_letter(letter)]
