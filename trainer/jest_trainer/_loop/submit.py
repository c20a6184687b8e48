"""Makes a super-batch's rows known to the server: their keys first, then the features that it asks for."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from jest_trainer._rpc.deadlines import Cancelled
from jest_trainer._rpc.features import parts
from jest_trainer.errors import DEAD_LETTERED, JestError
from jest_wire import tracing

if TYPE_CHECKING:
    from collections.abc import Callable

    from jest_trainer._loop.read_batch import BatchReader
    from jest_trainer._rpc.calls import SuperBatchCalls
    from jest_trainer._rpc.deadlines import Cancellation, Deadline
    from jest_trainer.job import Job
    from jest_wire.spans import SuperBatchSpan

_log = logging.getLogger(__name__)

_PAUSE_S = 1.0
"""Between two rounds of calls that each used up its deadline, while the loop does not wait for the result."""

Batch = TypeVar("Batch")


@dataclass(eq=False)
class Submission(Generic[Batch]):
    """A super-batch that the server knows; `dead_letter` says why it will never get a decision, if that is so."""

    step: int
    batch: Batch
    keys: list[str]
    group_labels: list[str]
    sources: list[str]
    calls: SuperBatchCalls
    dead_letter: JestError | None = None

    @property
    def span(self) -> SuperBatchSpan:
        """The span of its life: from its keys to the sub-batch, or to whatever else becomes of it."""
        return self.calls.span


class Submitter(Generic[Batch]):
    """Submits super-batches of one rank of one job."""

    def __init__(self, job: Job, reader: BatchReader[Batch], rank: int, prefix: str) -> None:
        self._job = job
        self._reader = reader
        self._rank = rank
        self._prefix = prefix

    def submit_ahead(
        self, step: int, batch: Batch, cancellation: Cancellation, is_awaited: Callable[[], bool]
    ) -> Submission[Batch]:
        """Submit a super-batch before it is needed.

        Transient errors are retried for as long as the loop does not wait for the result: while a training loop pauses
        to evaluate, the server may be full or restart without consequence.
        """
        super_batch_id = f"{self._prefix}{step:08d}"
        span = tracing.super_batch_span("sdk.super_batch", self._job.name, super_batch_id, self._rank)
        calls = self._job.calls(super_batch_id, self._rank, span)
        try:
            submission = self._read(step, batch, calls)
            self._submit_patiently(submission, cancellation, is_awaited)
        except Cancelled:
            span.end("abandoned")
            raise
        except BaseException as error:
            span.end("failed", error)
            raise
        return submission

    def submit(self, submission: Submission[Batch], deadline: Deadline) -> None:
        """Submit a super-batch, or submit it again, and upload what is missing."""
        submitted = submission.calls.submit(
            submission.keys,
            deadline,
            step=submission.step,
            group_labels=submission.group_labels,
            sources=submission.sources,
        )
        missing = submitted.missing_positions
        if not missing:
            return
        with submission.span.child("sdk.features"):
            features = self._reader.read_features(submission.batch, len(submission.keys), missing=len(missing))
        for part, tensors in parts(features, missing):
            submission.calls.upload(missing[part], tensors, deadline)

    def _read(self, step: int, batch: Batch, calls: SuperBatchCalls) -> Submission[Batch]:
        keys = self._reader.read_keys(batch)
        labels = self._reader.read_group_labels(batch, len(keys))
        return Submission(step, batch, keys, labels, self._reader.read_sources(batch, len(keys)), calls)

    def _submit_patiently(
        self, submission: Submission[Batch], cancellation: Cancellation, is_awaited: Callable[[], bool]
    ) -> None:
        while True:
            try:
                return self.submit(submission, self._job.deadline(cancellation))
            except JestError as error:
                if error.reason == DEAD_LETTERED:
                    submission.dead_letter = error
                    return None
                if not error.transient or is_awaited():
                    raise
                _log.info("submitting super-batch %s again: %s", submission.calls.super_batch_id, error)
                cancellation.sleep(error.retry_after_s or _PAUSE_S)
