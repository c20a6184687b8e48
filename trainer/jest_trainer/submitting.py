"""Gets one super-batch's rows known to the server: their keys first, then the features that it asks for."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from jest_proto import tracing
from jest_trainer.deadlines import Cancelled
from jest_trainer.errors import DEAD_LETTERED, JestError
from jest_trainer.features import Array, check_features, parts
from jest_trainer.keys import key_strings, label_strings, source_strings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from jest_trainer.ahead import Ahead
    from jest_trainer.conversation import Conversation
    from jest_trainer.deadlines import Cancellation, Deadline
    from jest_trainer.job import Job

_log = logging.getLogger(__name__)

_PAUSE_S = 1.0
"""Between two rounds of calls that each used up its deadline, while nobody waits."""

Batch = TypeVar("Batch")


@dataclass(eq=False)
class Submission(Generic[Batch]):
    """A super-batch that the server knows of; `dead` is why it will never get a decision, if that is known already."""

    step: int
    batch: Batch
    keys: list[str]
    group_labels: list[str]
    sources: list[str]
    conversation: Conversation
    dead: JestError | None = None

    @property
    def held(self) -> tracing.Held:
        """The span of its life: from its keys to the sub-batch, or to whatever else becomes of it."""
        return self.conversation.held


class Submitter(Generic[Batch]):
    """Submits super-batches of one rank of one job."""

    def __init__(
        self,
        job: Job,
        keys: Callable[[Batch], Iterable[Any]],
        group_labels: Callable[[Batch], Iterable[Any]] | None,
        features: Callable[[Batch], Mapping[str, Array]] | None,
        sources: Callable[[Batch], Iterable[str | None]] | None,
        rank: int,
        prefix: str,
    ) -> None:
        self._job = job
        self._keys = keys
        self._group_labels = group_labels
        self._features = features
        self._sources = sources
        self._rank = rank
        self._prefix = prefix

    def submit_ahead(
        self, step: int, batch: Batch, cancellation: Cancellation, ahead: Ahead[Any, Submission[Batch]]
    ) -> Submission[Batch]:
        """Submit a super-batch long before it is needed.

        As long as nobody waits for it, trouble that may pass does no harm: while a training loop pauses to evaluate,
        the server may be full or restart without anybody noticing.
        """
        super_batch_id = f"{self._prefix}{step:08d}"
        held = tracing.held("sdk.super_batch", self._job.name, super_batch_id, self._rank)
        conversation = self._job.conversation(super_batch_id, self._rank, held)
        try:
            return self._submit_ahead(step, batch, conversation, cancellation, ahead)
        except Cancelled:
            held.end("abandoned")
            raise
        except BaseException as error:
            held.end("failed", error)
            raise

    def _submit_ahead(
        self,
        step: int,
        batch: Batch,
        conversation: Conversation,
        cancellation: Cancellation,
        ahead: Ahead[Any, Submission[Batch]],
    ) -> Submission[Batch]:
        keys = key_strings(self._keys(batch))
        labels = [] if self._group_labels is None else label_strings(self._group_labels(batch), len(keys))
        places = [] if self._sources is None else source_strings(self._sources(batch), len(keys))
        submission = Submission(step, batch, keys, labels, places, conversation)
        while True:
            try:
                self.submit(submission, self._job.deadline(cancellation))
            except JestError as error:
                if error.reason == DEAD_LETTERED:
                    submission.dead = error
                elif error.transient and not ahead.waited_for:
                    _log.info("nobody waits for super-batch %s yet, going on: %s", conversation.super_batch_id, error)
                    cancellation.sleep(error.retry_after_s or _PAUSE_S)
                    continue
                else:
                    raise
            return submission

    def submit(self, submission: Submission[Batch], deadline: Deadline) -> None:
        """Submit a super-batch, once more if need be, and upload what is missing."""
        submitted = submission.conversation.submit(
            submission.keys,
            deadline,
            step=submission.step,
            group_labels=submission.group_labels,
            sources=submission.sources,
        )
        missing = submitted.missing_positions
        if not missing:
            return
        if self._features is None:
            raise ValueError(f"features must be given: the server lacks {len(missing)} rows of a super-batch")
        with submission.held.child("sdk.features"):
            features = self._features(submission.batch)
        check_features(features, len(submission.keys))
        for part, tensors in parts(features, missing):
            submission.conversation.upload(missing[part], tensors, deadline)
