"""Gets the decision on a submitted super-batch: the learner's forward pass, the call, and the accounts of both."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Generic, TypeVar

from jest_trainer._rpc.encode_outputs import WireDtype, encode_outputs
from jest_trainer.errors import DEAD_LETTERED, REFERENCE_MISSING, SUPER_BATCH_UNKNOWN, JestError

if TYPE_CHECKING:
    from jest_trainer._loop.read_batch import BatchReader
    from jest_trainer._loop.stats import Accounts
    from jest_trainer._loop.submit import Submission, Submitter
    from jest_trainer.job import Job
    from jest_trainer.outputs import LearnerOutputs
    from jest_trainer.results import SubBatch

_log = logging.getLogger(__name__)

_MAX_RESUBMISSIONS = 3
"""How often one super-batch is submitted again because its reference embeddings were evicted meanwhile."""

Batch = TypeVar("Batch")


class SubBatchSelector(Generic[Batch]):
    """Selects sub-batches of super-batches that `submitter` has submitted.

    Args:
        job: whose policy chooses.
        reader: reads the batches.
        submitter: submits a super-batch again if the server has lost it.
        accounts: where time and decisions are counted.
        wire_dtype: element type in which the learner's outputs are sent.
        return_reference_embeddings: ask for the chosen rows' reference embeddings.
        max_dead_letters: how many super-batches in a row may end without a decision.
    """

    def __init__(
        self,
        job: Job,
        reader: BatchReader[Batch],
        submitter: Submitter[Batch],
        accounts: Accounts,
        *,
        wire_dtype: WireDtype,
        return_reference_embeddings: bool,
        max_dead_letters: int,
    ) -> None:
        self._job = job
        self._reader = reader
        self._submitter = submitter
        self._accounts = accounts
        self._wire_dtype: WireDtype = wire_dtype
        self._return_reference_embeddings = return_reference_embeddings
        self._max_dead_letters = max_dead_letters
        self._dead_letters_in_a_row = 0

    def select(self, submission: Submission[Batch]) -> SubBatch | None:
        """Return the decision, None if the super-batch was dead-lettered.

        Raises:
            JestError: The call failed, or too many super-batches in a row were dead-lettered.
            ValueError: The learner's outputs are not what the job's policy wants.
        """
        try:
            if submission.dead_letter is not None:
                raise submission.dead_letter
            outputs = self._embed(submission)
            with self._accounts.timing("select_seconds"):
                decision = self._call(submission, outputs)
        except JestError as error:
            if error.reason != DEAD_LETTERED:
                raise
            self._skip(submission, error)
            return None
        self._accept(submission, decision)
        return decision

    def _embed(self, submission: Submission[Batch]) -> LearnerOutputs:
        with self._accounts.timing("embed_seconds"), submission.span.child("sdk.embed"):
            return self._reader.read_outputs(submission.batch, len(submission.keys), self._job)

    def _call(self, submission: Submission[Batch], outputs: LearnerOutputs) -> SubBatch:
        deadline = self._job.deadline()
        encoded = encode_outputs(outputs, self._job.policy, self._wire_dtype)
        last_step = self._accounts.end_step()
        for resubmissions in range(_MAX_RESUBMISSIONS + 1):
            try:
                return submission.calls.select(
                    encoded,
                    deadline,
                    return_reference_embeddings=self._return_reference_embeddings,
                    last_step=last_step,
                )
            except JestError as error:
                if error.reason not in (REFERENCE_MISSING, SUPER_BATCH_UNKNOWN) or resubmissions == _MAX_RESUBMISSIONS:
                    raise
                _log.info("submitting again: %s", error)
                self._submitter.submit(submission, deadline)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _accept(self, submission: Submission[Batch], decision: SubBatch) -> None:
        self._accounts.count_decision(len(submission.keys), decision)
        self._dead_letters_in_a_row = 0
        if decision.fallback is None:
            return
        submission.span.chosen_by_fallback(decision.fallback, decision.fallback_reason)
        _log.warning(
            "super-batch %s of job %s was chosen by the fallback %s: %s",
            decision.super_batch_id,
            self._job.name,
            decision.fallback,
            decision.fallback_reason,
        )

    def _skip(self, submission: Submission[Batch], error: JestError) -> None:
        submission.span.end("dead_lettered", error)
        self._accounts.count_dead_letter(len(submission.keys))
        self._dead_letters_in_a_row += 1
        if self._dead_letters_in_a_row > self._max_dead_letters:
            error.add_note(
                f"{self._dead_letters_in_a_row} super-batches in a row were dead-lettered; this is hardly chance."
            )
            raise error
        _log.warning("continuing without a super-batch: %s", error)
