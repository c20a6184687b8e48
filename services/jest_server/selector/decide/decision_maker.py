"""How a decision comes about: wait for the ranks, wait for the reference, select, record."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from jest_core import selection_seed
from jest_server.domain.dead_letters import DeadLetter
from jest_server.domain.decisions import Decision
from jest_server.domain.errors import DeadLettered, SuperBatchUnknown
from jest_server.runtime.logs import get_logger
from jest_server.selector.decide.selection import SelectionResult, SelectionTask, effective_policy, select
from jest_server.selector.learner_outputs.pending_selections import Outcome
from jest_wire import tracing

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import torch

    from jest_server.domain.decisions import Retention
    from jest_server.domain.jobs import Job
    from jest_server.domain.ports import DecisionLog
    from jest_server.domain.super_batches import SuperBatch, SuperBatchRef
    from jest_server.runtime.metrics import SelectorMetrics
    from jest_server.selector.decide.decision_inputs import DecisionInputs
    from jest_server.selector.decide.join_reference import JoinedReference
    from jest_server.selector.learner_outputs.pending_selections import PendingSelection
    from jest_server.use_cases.jobs import JobRegistry

T = TypeVar("T")
_log = get_logger()


class Scheduler(Protocol):
    """Decides which of the selections that wait is computed next."""

    async def run(self, job: str, cost: float, work: Callable[[], T]) -> T:
        """Run the work in a thread when it is the job's turn; `cost` is relative."""


class DecisionMaker:
    """Makes decisions on pending selections."""

    def __init__(
        self,
        decisions: DecisionLog,
        jobs: JobRegistry,
        inputs: DecisionInputs,
        scheduler: Scheduler,
        metrics: SelectorMetrics,
        *,
        device: torch.device,
        keep: Retention,
    ) -> None:
        self._decisions = decisions
        self._jobs = jobs
        self._inputs = inputs
        self._scheduler = scheduler
        self._metrics = metrics
        self._device = device
        self._keep = keep

    async def decide(self, pending: PendingSelection) -> Outcome:
        """Decide once all ranks' outputs and the reference embeddings are there, and record the decision.

        Raises:
            ReferenceTimeout: If the embeddings are late and the job has no fallback.
            ReferenceMissing: If some are gone, or were never uploaded.
            DeadLettered, SuperBatchUnknown: If the super-batch is not in flight, or nothing can be selected from it.
        """
        try:
            return await self._decide_in_flight(pending)
        except SuperBatchUnknown:
            # Another selector may have decided since this call began.
            decision = await self._decisions.get_decision(pending.ref)
            if decision is None:
                raise
            return Outcome(decision, None)

    async def _decide_in_flight(self, pending: PendingSelection) -> Outcome:
        with _stage("selector.wait_learner", pending.ref):
            await self._inputs.wait_for_ranks(pending)
        learner_at = time.monotonic()
        pending.stage = "WAITING_FOR_REFERENCE"
        job = await self._jobs.get(pending.ref.job)
        with _stage("selector.wait_reference", pending.ref):
            super_batch, joined, fallback_reason = await self._inputs.wait_for_reference(pending.ref, job.spec)
        reference_at = time.monotonic()
        pending.stage = "COMPUTING"
        with _stage("selector.compute", pending.ref):
            decision, learnability = await self._compute(pending, job, super_batch, joined, fallback_reason)
        timings = {
            "wait_learner": learner_at - pending.started_at,
            "wait_reference": reference_at - learner_at,
            **decision.timings_s,
        }
        record_at = time.monotonic()
        decision = decision.model_copy(update={"timings_s": timings})
        with _stage("selector.record", pending.ref):
            recorded = await self._decisions.decide(decision, keep_s=self._keep.seconds, keep_count=self._keep.count)
        if recorded == decision:
            self._observe(recorded, learnability, record_s=time.monotonic() - record_at)
        rows = tuple(len(super_batch.submissions[rank].keys) for rank in range(pending.world_size))
        return Outcome(recorded, joined.embeddings if joined else None, rows)

    async def _compute(
        self,
        pending: PendingSelection,
        job: Job,
        super_batch: SuperBatch,
        joined: JoinedReference | None,
        fallback_reason: str,
    ) -> tuple[Decision, tuple[float, float] | None]:
        """Return the decision to record, and the learnability of selected and dropped rows (see `SelectionResult`)."""
        fallback = job.spec.fallback if fallback_reason else None
        task = SelectionTask(
            spec=effective_policy(job.spec.policy, fallback),
            seed=selection_seed(job.spec.seed, super_batch.step),
            step=super_batch.step,
            submissions=super_batch.submissions,
            outputs=pending.outputs,
            reference=(super_batch.reference, joined.embeddings) if joined and super_batch.reference else None,
        )

        def work() -> tuple[float, SelectionResult]:
            return time.monotonic(), select(task, self._device)

        queued_at = time.monotonic()
        try:
            started_at, result = await self._scheduler.run(pending.ref.job, task.cost(), work)
        except ValueError as error:
            raise await self._dead_letter(pending.ref, str(error)) from error
        decision = Decision(
            job=pending.ref.job,
            super_batch_id=pending.ref.super_batch_id,
            policy=job.spec.policy,
            seed=task.seed,
            reference=super_batch.reference,
            learner_digests={rank: outputs.digest for rank, outputs in pending.outputs.items()},
            submission_digests={rank: submission.digest for rank, submission in super_batch.submissions.items()},
            positions=result.positions,
            weights=result.weights,
            step=super_batch.step,
            gain=result.gain,
            sub_batch_size=result.sub_batch_size,
            super_batch_size=sum(task.rows),
            perplexity=result.perplexity,
            cache_hits=joined.cache_hits if joined else 0,
            reference_inferences=joined.inferences if joined else 0,
            fallback=fallback,
            fallback_reason=fallback_reason,
            timings_s={"queue": started_at - queued_at, "compute": time.monotonic() - started_at},
            decided_at_s=time.time(),
        )
        return decision, result.learnability

    async def _dead_letter(self, ref: SuperBatchRef, detail: str) -> DeadLettered:
        letter = DeadLetter.of(ref, reason="UNSELECTABLE", detail=detail, at_s=time.time())
        if await self._decisions.dead_letter(letter):
            self._metrics.dead_lettered(letter)
        return DeadLettered(f"{ref} was dead-lettered: {detail}", ref.metadata)

    def _observe(self, decision: Decision, learnability: tuple[float, float] | None, *, record_s: float) -> None:
        self._metrics.decided(decision, {**decision.timings_s, "record": record_s}, learnability)
        if decision.fallback:
            _log.warning("fallback used", fallback=decision.fallback, reason=decision.fallback_reason)


def _stage(name: str, ref: SuperBatchRef) -> AbstractContextManager[Any]:
    """Record a stage of what all ranks wait for."""
    return tracing.span(name, job=ref.job, super_batch_id=ref.super_batch_id)
