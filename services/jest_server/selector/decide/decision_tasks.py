"""One task per super-batch makes its decision, whichever rank calls first; each caller waits until its own deadline."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from jest_server.domain.errors import JestServerError, Stopping, WaitTimeout
from jest_server.runtime.logs import bound, get_logger

if TYPE_CHECKING:
    from jest_server.selector.decide.decision_maker import DecisionMaker
    from jest_server.selector.learner_outputs.pending_selections import (
        LearnerOutputs,
        Outcome,
        PendingSelection,
        PendingSelections,
    )
    from jest_server.selector.learner_outputs.request import SelectRequest

RETRY_S: Final = 0.5

_log = get_logger()


class DecisionTasks:
    """The decisions that are being made."""

    def __init__(self, selections: PendingSelections, maker: DecisionMaker) -> None:
        self._selections = selections
        self._maker = maker
        self._tasks: set[asyncio.Task[None]] = set()

    async def outcome(self, request: SelectRequest, outputs: LearnerOutputs) -> Outcome:
        """Add one rank's outputs to the super-batch's pending selection, and wait for its outcome.

        Raises:
            Conflict: If the ranks' outputs do not fit together.
            ReferenceMissing, ReferenceTimeout, DeadLettered: If no decision can be made.
            WaitTimeout: If the call's deadline came first; the message says what is missing.
        """
        pending = self._selections.join(request.ref, request.world_size, self._start)
        pending.add(request.rank, outputs)
        try:
            async with asyncio.timeout(request.patience_s):
                return await asyncio.shield(pending.outcome)
        except TimeoutError:
            raise WaitTimeout(
                f"no decision on {request.ref} within the caller's deadline: {_waiting_for(pending)}",
                request.metadata,
                retry_after_s=None,
                reason=pending.stage,
            ) from None

    async def close(self) -> None:
        """Give up what is undecided; the ranks will call again."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, pending: PendingSelection) -> None:
        task = asyncio.create_task(self._conclude(pending))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _conclude(self, pending: PendingSelection) -> None:
        """Bring a pending selection to its outcome, whatever happens, and drop it."""
        with bound(job=pending.ref.job, super_batch=pending.ref.super_batch_id):
            try:
                pending.outcome.set_result(await self._maker.decide(pending))
            except JestServerError as error:
                pending.outcome.set_exception(error)
            except asyncio.CancelledError:
                pending.outcome.set_exception(Stopping("the selector is stopping; call again", retry_after_s=RETRY_S))
                raise
            except Exception as error:  # noqa: BLE001 - raised again to every caller
                _log.exception("selection failed")
                pending.outcome.set_exception(error)
            finally:
                self._selections.drop(pending)
                pending.outcome.exception()  # retrieved here, because the callers may all have left


def _waiting_for(pending: PendingSelection) -> str:
    if pending.missing_ranks():
        return f"learner outputs of ranks {pending.missing_ranks()} have not come"
    if pending.stage == "WAITING_FOR_REFERENCE":
        return "its reference embeddings are not there"
    return "the selection is being computed"
