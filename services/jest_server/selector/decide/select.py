"""The use case of choosing: gather the ranks, let a decision be made, then answer.

One task per super-batch makes the decision, whichever rank comes first; every caller waits for its outcome, each no
longer than its own deadline.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jest_server.domain.errors import Conflict, JestServerError, Stopping, WaitTimeout
from jest_server.runtime.logs import bound, get_logger
from jest_server.selector.intake.request import OfRank, check_rank
from jest_server.selector.intake.submit import gone
from jest_server.selector.learner_outputs.pending import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jest_server.domain.policies import PolicySpec
    from jest_server.domain.ports import DecisionLog, SuperBatchStore
    from jest_server.domain.super_batches import SuperBatch
    from jest_server.runtime.metrics import SelectorMetrics
    from jest_server.selector.decide.decision_maker import Decider
    from jest_server.selector.learner_outputs.pending import Assemblies, Assembly, LearnerOutputs
    from jest_server.use_cases.jobs import Jobs

ANSWER_MARGIN_S = 0.25
"""How long before a caller's deadline its answer is given up, so that it learns the reason."""
RETRY_S = 0.5
UNSERVED_GRACE_S = 60.0
"""How long a reference model's version may be away, while another is served, before what waits for it is set aside."""
SUBMISSIONS_POLL_S = 0.1
"""How often a rank that came early looks whether the others have submitted: nobody tells the news of that."""

_log = get_logger()


@dataclass(frozen=True)
class Call(OfRank):
    """Who asks for which selection."""

    world_size: int


class Selections:
    """Makes one decision per super-batch and tells it to every rank and every retry."""

    def __init__(
        self,
        super_batches: SuperBatchStore,
        decisions: DecisionLog,
        jobs: Jobs,
        assemblies: Assemblies,
        decider: Decider,
        metrics: SelectorMetrics,
    ) -> None:
        self._super_batches = super_batches
        self._decisions = decisions
        self._jobs = jobs
        self._assemblies = assemblies
        self._decider = decider
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()

    async def policy_of(self, call: Call) -> PolicySpec:
        """Returns the policy of the call's job.

        Raises:
            InvalidField, JobUnknown: If the call's ids cannot be.
        """
        spec = (await self._jobs.get(call.job)).spec
        check_rank(call.rank, call.world_size, spec)
        return spec.policy

    async def recorded(self, call: Call, digest: str) -> Outcome | None:
        """Returns the decision if it was recorded before; nothing needs to be received then.

        Raises:
            Conflict: If the decision was made from other learner outputs of this rank.
        """
        decision = await self._decisions.get_decision(call.ref)
        return None if decision is None else _for_these(Outcome(decision, None), call, digest)

    async def rows_of(self, call: Call) -> int:
        """Returns how many rows the rank submitted.

        Raises:
            SuperBatchUnknown, DeadLettered: If the super-batch is not in flight.
        """
        return len((await self._submitted(call)).submissions[call.rank].keys)

    async def rows_of_all(self, call: Call, *, deadline_s: float) -> list[int]:
        """Returns how many rows each rank submitted, once all have, waiting at most ``deadline_s`` seconds.

        Raises:
            SuperBatchUnknown, DeadLettered: If the super-batch is not in flight, or this rank did not submit it.
            WaitTimeout: If the deadline came first; the message tells who has not submitted.
        """
        absent = list(range(call.world_size))
        try:
            async with asyncio.timeout(max(deadline_s - ANSWER_MARGIN_S, 0.0)):
                while True:
                    submissions = (await self._submitted(call)).submissions
                    absent = [rank for rank in range(call.world_size) if rank not in submissions]
                    if not absent:
                        return [len(submissions[rank].keys) for rank in range(call.world_size)]
                    await asyncio.sleep(SUBMISSIONS_POLL_S)
        except TimeoutError:
            raise WaitTimeout(
                f"super-batch {call.super_batch_id!r} of job {call.job!r} has no known size within the caller's "
                f"deadline: ranks {absent} have not submitted their rows",
                call.context(),
                reason="WAITING_FOR_RANKS",
            ) from None

    async def select(self, call: Call, outputs: LearnerOutputs, *, deadline_s: float) -> Outcome:
        """Adds one rank's outputs and waits for the decision, at most ``deadline_s`` seconds.

        Raises:
            Conflict: If the rank sent other outputs before, or the ranks' outputs do not fit together.
            ReferenceMissing, ReferenceTimeout, DeadLettered: As their names say.
            WaitTimeout: If the deadline came first; the message tells who has not come.
        """
        assembly = self._assemblies.join(call.job, call.super_batch_id, call.world_size, self._start)
        assembly.add(call.rank, outputs)
        try:
            async with asyncio.timeout(max(deadline_s - ANSWER_MARGIN_S, 0.0)):
                return _for_these(await asyncio.shield(assembly.outcome), call, outputs.digest)
        except TimeoutError:
            raise WaitTimeout(
                f"no decision on super-batch {call.super_batch_id!r} of job {call.job!r} within the caller's deadline: "
                f"{_whom(assembly)}",
                call.context(),
                retry_after_s=None,
                reason=assembly.stage,
            ) from None

    async def sweep(self) -> None:
        """Dead-letters super-batches that were never decided and lets go of what is held for them."""
        letters = await self._decisions.dead_letter_overdue(now_s=time.time())
        letters += await self._decisions.dead_letter_unserved(grace_s=UNSERVED_GRACE_S, now_s=time.time())
        for letter in letters:
            self._metrics.dead_lettered(letter)
            _log.warning(
                "super-batch set aside", job=letter.job, super_batch=letter.super_batch_id, reason=letter.reason
            )

    def stepped(self, call: Call, phases_s: Mapping[str, float]) -> None:
        """Counts where the time of a rank's step went, as its trainer tells."""
        self._metrics.stepped(call.job, phases_s)

    async def forget_ended_jobs(self) -> None:
        """Removes the series of jobs that are not there any more, or that nothing was heard of for long."""
        for job in self._metrics.jobs.named:
            if self._metrics.jobs.is_idle(job) or not await self._jobs.exists(job):
                self._metrics.jobs.forget(job)

    async def close(self) -> None:
        """Gives up what is undecided; the ranks will ask again."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _submitted(self, call: Call) -> SuperBatch:
        """Returns the super-batch, if it is in flight with the rank's rows."""
        super_batch = await self._super_batches.get_super_batch(call.ref)
        if super_batch is None or call.rank not in super_batch.submissions:
            raise await gone(self._decisions, call.ref, call.rank)
        return super_batch

    def _start(self, assembly: Assembly) -> None:
        task = asyncio.create_task(self._conclude(assembly))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _conclude(self, assembly: Assembly) -> None:
        """Brings an assembly to its outcome, whatever happens, and lets go of it."""
        with bound(job=assembly.job, super_batch=assembly.super_batch_id):
            try:
                assembly.outcome.set_result(await self._decider.decide(assembly))
            except JestServerError as error:
                assembly.outcome.set_exception(error)
            except asyncio.CancelledError:
                assembly.outcome.set_exception(Stopping("the selector is stopping; call again", retry_after_s=RETRY_S))
                raise
            except Exception as error:  # noqa: BLE001 - told to the test
                _log.exception("selection failed")
                assembly.outcome.set_exception(error)
            finally:
                self._assemblies.drop(assembly)
                assembly.outcome.exception()  # the callers may all be gone: then nobody else looks at it


def _for_these(outcome: Outcome, call: Call, digest: str) -> Outcome:
    """Returns the outcome, unless it was made from other learner outputs than this call's."""
    if outcome.decision.learner_digests.get(call.rank) != digest:
        raise Conflict(
            f"super-batch {call.super_batch_id!r} of job {call.job!r} was decided from other learner outputs of rank "
            f"{call.rank}; every super-batch needs its own id",
            call.context(),
        )
    return outcome


def _whom(assembly: Assembly) -> str:
    if assembly.missing_ranks():
        return f"learner outputs of ranks {assembly.missing_ranks()} have not come"
    if assembly.stage == "WAITING_FOR_REFERENCE":
        return "its reference embeddings are not there"
    return "the selection is being computed"
