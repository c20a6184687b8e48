"""The story of a selection, from the header of a rank's call to the decision that answers it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jest_server.selector.intake.request import check_rank
from jest_server.selector.learner_outputs.header import check_header
from jest_server.selector.learner_outputs.pending_selections import Outcome

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from jest_server.domain.ports import DecisionLog
    from jest_server.runtime.metrics import SelectorMetrics
    from jest_server.selector.decide.decision_tasks import DecisionTasks
    from jest_server.selector.learner_outputs.receive import LearnerReceiver
    from jest_server.selector.learner_outputs.request import SelectRequest
    from jest_server.use_cases.jobs import JobRegistry


class SelectSubBatch:
    """Answers every rank of a super-batch, and every retry, with the same decision."""

    def __init__(
        self,
        log: DecisionLog,
        jobs: JobRegistry,
        receiver: LearnerReceiver,
        decisions: DecisionTasks,
        metrics: SelectorMetrics,
    ) -> None:
        self._log = log
        self._jobs = jobs
        self._receiver = receiver
        self._decisions = decisions
        self._metrics = metrics

    async def run(self, request: SelectRequest, messages: AsyncIterator[Any]) -> Outcome:
        """Check the header; unless there is a decision already, receive the learner's outputs and wait for one.

        Raises:
            InvalidField: If rank, header or tensors do not fit the job's policy or the submitted rows.
            JobUnknown, SuperBatchUnknown, DeadLettered: If there is nothing to select from.
            Conflict: If the ranks' outputs do not fit together.
            ReferenceMissing, ReferenceTimeout: If reference embeddings are missing, and there is no fallback.
            QueueFull, ChecksumMismatch: If the outputs cannot be received now.
            WaitTimeout: If the call's deadline came before the decision.
        """
        spec = (await self._jobs.get(request.ref.job)).spec
        check_rank(request.rank, request.world_size, spec)
        check_header(request.header, spec.policy)
        recorded = await self._log.get_decision(request.ref)
        if recorded is not None:
            return Outcome(recorded, None)
        outputs = await self._receiver.receive(request, messages)
        outcome = await self._decisions.outcome(request, outputs)
        if request.last_step_s is not None:
            self._metrics.stepped(request.ref.job, request.last_step_s)
        return outcome
