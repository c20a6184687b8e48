"""What becomes of super-batches, in this process's memory: decisions, dead letters, and those in flight again."""

from __future__ import annotations

import heapq
import time
from typing import TYPE_CHECKING

from jest_server.domain.dead_letters import DeadLetter, RequeueStatus
from jest_server.domain.decisions import DECISIONS_KEPT
from jest_server.domain.errors import DeadLettered, SuperBatchUnknown
from jest_server.domain.super_batches import Limits
from jest_server.domain.tenants import prefix_of
from jest_server.stores.memory.jobs import MemoryRegistry
from jest_server.stores.memory.state import InFlight

if TYPE_CHECKING:
    from collections.abc import Callable

    from jest_server.domain.decisions import Decision
    from jest_server.domain.references import ReferenceInfo

LETTERS_KEPT = 1000
SET_ASIDE_KEPT = 100


class MemoryOutcomes(MemoryRegistry):
    """How super-batches leave flight, and what is kept of them."""

    async def decide(self, decision: Decision, *, keep_s: float, keep_count: int = DECISIONS_KEPT) -> Decision:
        """See the port."""
        job, super_batch_id = decision.job, decision.super_batch_id
        recorded = await self.get_decision(job, super_batch_id)
        if recorded is not None:
            return recorded
        state, context = self._jobs.get(job), {"job": job, "super_batch_id": super_batch_id}
        if state is not None and super_batch_id in state.letters:
            raise DeadLettered(f"super-batch {super_batch_id!r} of job {job!r} was set aside", context)
        if state is None or super_batch_id not in state.in_flight:
            raise SuperBatchUnknown(f"super-batch {super_batch_id!r} of job {job!r} is not in flight", context)
        until = time.monotonic() + keep_s
        state.decisions[super_batch_id] = (decision, until)
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
        self._let_go(state, super_batch_id)
        return decision

    async def get_decision(self, job: str, super_batch_id: str) -> Decision | None:
        """See the port."""
        state = self._jobs.get(job)
        if state is None:
            return None
        state.forget_decisions()
        decision, _ = state.decisions.get(super_batch_id, (None, 0.0))
        return decision

    async def list_decisions(self, job: str, *, before: str, limit: int) -> tuple[list[Decision], str]:
        """See the port."""
        state = self._jobs.get(job)
        if state is None:
            return [], ""
        state.forget_decisions()
        found = sorted((f"{until:020.6f}:{name}" for name, (_, until) in state.decisions.items()), reverse=True)
        page = [place for place in found if not before or place < before][: limit + 1]
        decisions = [state.decisions[place.partition(":")[2]][0] for place in page[:limit]]
        return decisions, page[limit - 1] if len(page) > limit else ""

    async def get_dead_letter(self, job: str, super_batch_id: str) -> DeadLetter | None:
        """See the port."""
        state = self._jobs.get(job)
        return None if state is None else state.letters.get(super_batch_id)

    async def list_dead_letters(self, job: str, *, limit: int) -> list[DeadLetter]:
        """See the port."""
        state = self._jobs.get(job)
        letters = [] if state is None else list(state.letters.values())
        return sorted(letters, key=lambda letter: (letter.at_s, letter.super_batch_id), reverse=True)[:limit]

    async def dead_letter(self, letter: DeadLetter) -> bool:
        """See the port."""
        state = self._jobs.get(letter.job)
        if state is None or letter.super_batch_id not in state.in_flight:
            return False
        state.add(dead_lettered=1, in_flight=-1)
        state.letters[letter.super_batch_id] = letter
        state.set_aside[letter.super_batch_id] = state.in_flight[letter.super_batch_id]
        self._let_go(state, letter.super_batch_id)
        while len(state.set_aside) > SET_ASIDE_KEPT:
            del state.set_aside[state.oldest_letter(state.set_aside)]
        while len(state.letters) > LETTERS_KEPT:
            del state.letters[state.oldest_letter(state.letters)]
        return True

    async def drop_dead_letter(self, job: str, super_batch_id: str) -> bool:
        """See the port."""
        state = self._jobs.get(job)
        if state is None or super_batch_id not in state.letters:
            return False
        state.set_aside.pop(super_batch_id, None)
        del state.letters[super_batch_id]
        return True

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
        state = self._jobs.get(job)
        if state is None or super_batch_id not in state.letters:
            return RequeueStatus.NO_LETTER
        if super_batch_id not in state.set_aside:
            return RequeueStatus.FORGOTTEN
        full = limits.whose_is_reached(self._held_by(job, lambda _: 1), more=1)
        if full is not None:
            return RequeueStatus(full)
        before = state.set_aside.pop(super_batch_id)
        del state.letters[super_batch_id]
        held = InFlight(reference, before.world_size, before.step, now_s, now_s + ttl_s)
        held.submissions = {
            rank: submission.model_copy(update={"reference": reference})
            for rank, submission in before.submissions.items()
        }
        state.in_flight[super_batch_id] = held
        state.add(dead_lettered=-1, in_flight=1)
        return RequeueStatus.REQUEUED

    async def dead_letter_overdue(self, *, now_s: float) -> list[DeadLetter]:
        """See the port."""
        letters = [
            DeadLetter.expired(job, super_batch_id, at_s=now_s)
            for job, state in self._jobs.items()
            for super_batch_id, held in state.in_flight.items()
            if held.deadline_s <= now_s
        ]
        return [letter for letter in letters if await self.dead_letter(letter)]

    async def dead_letter_unserved(self, *, grace_s: float, now_s: float) -> list[DeadLetter]:
        """See the port."""
        letters = []
        for queued in list(self._queue.values()):
            model, version = queued.version
            current = [k.info.version for k in self._references.values() if k.info.name == model and k.served]
            own = self._references.get(queued.version)
            if current and (own is None or own.until + grace_s <= time.monotonic()):
                job, super_batch_id = queued.shard.job, queued.shard.super_batch_id
                letters.append(
                    DeadLetter.unserved(job, super_batch_id, model=model, version=version, current=current, at_s=now_s)
                )
        return [letter for letter in letters if await self.dead_letter(letter)]

    def _held_by(self, job: str, amount: Callable[[InFlight], int]) -> Limits:
        """Sums an amount over the super-batches in flight of a job, of its tenant, and of all."""
        tenant = prefix_of(job)
        sums = {name: sum(amount(held) for held in state.in_flight.values()) for name, state in self._jobs.items()}
        theirs = sum(held for name, held in sums.items() if tenant and name.startswith(tenant))
        return Limits(job=sums.get(job, 0), tenant=theirs, server=sum(sums.values()))
