"""The loop: super-batches in, the sub-batches worth training on out.

Loading, submitting and uploading run in a background thread, some super-batches ahead, so that the reference model
works while the learner trains. Only the learner's forward pass has to wait for its turn: it must be the current one.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, get_args

from jest_trainer.ahead import Ahead
from jest_trainer.announcing import WireDtype, announce
from jest_trainer.batches import take_rows
from jest_trainer.deadlines import Cancellation
from jest_trainer.distributed import resolve_rank
from jest_trainer.errors import (
    DEAD_LETTERED,
    REFERENCE_MISSING,
    SUPER_BATCH_CONFLICT,
    SUPER_BATCH_UNKNOWN,
    JestError,
)
from jest_trainer.learner import embed_super_batch
from jest_trainer.needs import describe, needs_reference_model
from jest_trainer.stats import Stats, StepClock
from jest_trainer.submitting import Submission, Submitter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType

    from torch import Tensor

    from jest_core import SelectionPolicy
    from jest_trainer.deadlines import Deadline
    from jest_trainer.features import Array
    from jest_trainer.job import Job
    from jest_trainer.outputs import LearnerOutputs
    from jest_trainer.results import SubBatch

_log = logging.getLogger(__name__)

_MOST_RESUBMISSIONS = 3
"""How often one super-batch is submitted again because its reference embeddings were evicted meanwhile."""
_MOST_DEAD_LETTERS = 8
"""How many super-batches in a row, beyond those that were prefetched together, may go without a decision."""
_PREFIX = re.compile(r"[A-Za-z0-9._:-]{0,64}")

Batch = TypeVar("Batch")


class SelectedBatches(Generic[Batch]):
    """Iterates over super-batches, each reduced to the rows that the job's policy chose of it.

    Each `for` loop is a new pass over `super_batches`; leaving it stops its background thread. Steps go on counting
    from pass to pass, and name the super-batches: `{prefix}{step:08d}`, the same on every rank; they are also the steps
    of the policy's schedules. All ranks have to see equally many super-batches, and each has to hold the same rows
    whenever it is loaded again under the same name.

    `keys`, `group_labels` and `features` are called in the background thread and `super_batches` is iterated there:
    give random augmentations a generator of their own. `embed` is called in the loop's thread, without gradients,
    between two training steps, with the model in whatever mode (train or eval) it is in; the reduced batch is what
    `embed` saw.

    Args:
        job: from `Client.create_job` or `Client.get_job`.
        super_batches: anything that yields batches; a DataLoader, for instance.
        keys: one key for each row, strings or integers: what the example is called in the reference cache for ever.
        embed: what the learner makes of all rows. Under the losses `sigmoid` and `softmax` its `Embeddings`, normalised
            as its loss takes them, with its current scale and bias; under `pairwise` its `PairLosses`; under
            `per_example` the `ExampleLosses`.
        features: the reference model's inputs by name, a row for each key. Only called when the server lacks some. Has
            to be given if the policy needs a reference model.
        sources: where each row's example is, `URL.tar#KEY` or the URL of a picture, for the server to read what it
            lacks itself; None for a row that is uploaded. With it, `features` need only be given for such rows.
        group_labels: the group of each row, such as a concept: a string or an integer, None for a row of no group.
            Has to be given if the policy has `max_per_group`.
        take: reduces a batch to the rows at the given positions (int64, on the CPU); None handles the usual makes.
        rank: None asks torch.distributed.
        prefetch: how many super-batches to submit ahead, the same on every rank.
        prefix: distinguishes super-batches that have equal steps and other rows, such as `"epoch0-"`.
        wire_dtype: element type in which the learner's outputs are sent; the decision is made from what is sent.
        return_reference_embeddings: ask for the chosen rows' reference embeddings, found in `last`.

    Raises:
        ValueError: a value cannot be.
    """

    def __init__(  # noqa: PLR0913 - all that a loop decides; the last ten have defaults
        self,
        job: Job,
        super_batches: Iterable[Batch],
        *,
        keys: Callable[[Batch], Iterable[Any]],
        embed: Callable[[Batch], LearnerOutputs],
        features: Callable[[Batch], Mapping[str, Array]] | None = None,
        sources: Callable[[Batch], Iterable[str | None]] | None = None,
        group_labels: Callable[[Batch], Iterable[Any]] | None = None,
        take: Callable[[Batch, Tensor], Batch] | None = None,
        rank: int | None = None,
        prefetch: int = 2,
        prefix: str = "",
        wire_dtype: WireDtype = "as_is",
        return_reference_embeddings: bool = False,
    ) -> None:
        if prefetch < 1:
            raise ValueError(f"prefetch ({prefetch}) must be at least 1")
        if not _PREFIX.fullmatch(prefix):
            raise ValueError(f"prefix ({prefix!r}) must be at most 64 characters of [A-Za-z0-9._:-]")
        if wire_dtype not in get_args(WireDtype):
            raise ValueError(f"wire_dtype ({wire_dtype!r}) must be one of {', '.join(get_args(WireDtype))}")
        if job.fallback != "fail" and job.reference_timeout_s >= job.deadline_s:
            raise ValueError(
                f"the client's deadline_s ({job.deadline_s:g}) must be larger than the job's reference_timeout_s "
                f"({job.reference_timeout_s:g}), or its fallback {job.fallback!r} never gets its turn"
            )
        _check_policy(
            job.policy,
            features=features is not None or sources is not None,
            group_labels=group_labels is not None,
            return_reference_embeddings=return_reference_embeddings,
        )
        self._job = job
        self._super_batches = super_batches
        self._embed = embed
        self._take = take
        self._prefetch = prefetch
        self._wire_dtype: WireDtype = wire_dtype
        self._return_reference_embeddings = return_reference_embeddings
        self._submitter = Submitter(
            job, keys, group_labels, features, sources, resolve_rank(rank, job.world_size), prefix
        )
        self._stats = Stats()
        self._clock = StepClock(self._stats)
        self._last: SubBatch | None = None
        self._next_step = 0
        self._unused_step = 0
        self._dead_in_a_row = 0
        self._pass: Ahead[tuple[int, Batch], Submission[Batch]] | None = None

    @property
    def stats(self) -> Stats:
        """A copy of the accounts so far."""
        return replace(self._stats)

    @property
    def last(self) -> SubBatch | None:
        """The decision behind the batch that was yielded last; None before the first."""
        return self._last

    def state_dict(self) -> dict[str, int]:
        """Where the loop is: the step after the batch that was yielded last. Belongs into the checkpoint."""
        return {"next_step": self._next_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on at a recorded step; `super_batches` has to start with that step's super-batch.

        A job remembers its decisions: a loop that goes back behind steps which were decided with other weights or rows
        needs another `prefix`.

        Raises:
            ValueError: the state holds no step.
            RuntimeError: the loop is running.
        """
        step = state.get("next_step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"next_step ({step!r}) must be a step as state_dict() gives it, an integer of at least 0")
        if self._pass is not None:
            raise RuntimeError("load_state_dict must be called before the loop starts, or after it was left")
        self._next_step = self._unused_step = step

    def close(self) -> None:
        """Stop the background thread of a loop that was left, without waiting for the garbage collector."""
        if self._pass is not None:
            self._end(self._pass)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        current = self._pass = self._start()
        try:
            while (submission := self._await_submission(current)) is not None:
                submission.held.waited("sdk.wait_turn")
                with submission.held.ending("selected"):
                    chosen = self._choose(submission)
                    self._next_step = self._unused_step = submission.step + 1
                    if chosen is None:
                        continue
                    sub_batch = self._reduce(submission, chosen)
                del submission  # while its sub-batch is trained on, the super-batch need not stay in memory
                yield sub_batch
                del sub_batch
            self._pass = None
        finally:
            self._end(current)

    def _start(self) -> Ahead[tuple[int, Batch], Submission[Batch]]:
        cancellation = Cancellation()
        self._clock = StepClock(self._stats)

        def submit(
            numbered: tuple[int, Batch], ahead: Ahead[tuple[int, Batch], Submission[Batch]]
        ) -> Submission[Batch]:
            return self._submitter.submit_ahead(*numbered, cancellation, ahead)

        return Ahead(
            enumerate(self._super_batches, self._unused_step),
            submit,
            limit=self._prefetch,
            name=f"jest-submit-{self._job.name}",
            cancel=cancellation.cancel,
            drop=lambda submission: submission.held.end("abandoned"),
        )

    def _end(self, current: Ahead[tuple[int, Batch], Submission[Batch]]) -> None:
        current.close()
        if self._pass is current:
            self._pass = None
            # Left early: the ids of what was submitted ahead are taken, and how far that went differs between ranks.
            self._unused_step = self._next_step + self._prefetch + 1

    def _await_submission(self, current: Ahead[tuple[int, Batch], Submission[Batch]]) -> Submission[Batch] | None:
        started = time.perf_counter()
        try:
            return next(current, None)
        except JestError as error:
            _advise(error)
            raise
        finally:
            self._stats.submit_wait_seconds += time.perf_counter() - started

    def _choose(self, submission: Submission[Batch]) -> SubBatch | None:
        """Returns the decision, None if there will never be one."""
        try:
            if submission.dead is not None:
                raise submission.dead
            outputs = self._timed_embed(submission)
            started = time.perf_counter()
            try:
                chosen = self._select(submission, outputs, self._job.deadline())
            finally:
                self._stats.select_seconds += time.perf_counter() - started
        except JestError as error:
            if error.reason != DEAD_LETTERED:
                _advise(error)
                raise
            self._skip(submission, error)
            return None
        self._count(submission, chosen)
        return chosen

    def _timed_embed(self, submission: Submission[Batch]) -> LearnerOutputs:
        started = time.perf_counter()
        try:
            with submission.held.child("sdk.embed"):
                return embed_super_batch(
                    self._embed,
                    submission.batch,
                    rows=len(submission.keys),
                    policy=self._job.policy,
                    world_size=self._job.world_size,
                )
        finally:
            self._stats.embed_seconds += time.perf_counter() - started

    def _select(self, submission: Submission[Batch], outputs: LearnerOutputs, deadline: Deadline) -> SubBatch:
        announced = announce(outputs, self._job.policy, self._wire_dtype)
        last_step = self._clock.step(time.perf_counter())
        for resubmissions in range(_MOST_RESUBMISSIONS + 1):
            try:
                return submission.conversation.select(
                    announced,
                    deadline,
                    return_reference_embeddings=self._return_reference_embeddings,
                    last_step=last_step,
                )
            except JestError as error:
                if error.reason not in (REFERENCE_MISSING, SUPER_BATCH_UNKNOWN) or resubmissions == _MOST_RESUBMISSIONS:
                    raise
                _log.info("submitting again: %s", error)
                self._submitter.submit(submission, deadline)
        raise AssertionError("unreachable: the last turn returns or raises")

    def _count(self, submission: Submission[Batch], chosen: SubBatch) -> None:
        stats = self._stats
        stats.super_batches += 1
        stats.examples_loaded += len(submission.keys)
        stats.examples_trained += len(chosen.positions)
        stats.cache_hits += chosen.cache_hits
        stats.reference_inferences += chosen.reference_inferences
        if chosen.perplexity:
            stats.perplexity = sum(chosen.perplexity) / len(chosen.perplexity)
        if chosen.fallback is not None:
            stats.fallbacks += 1
            submission.held.chosen_by_fallback(chosen.fallback, chosen.fallback_reason)
            _log.warning(
                "super-batch %s of job %s was chosen by the fallback %s: %s",
                chosen.super_batch_id,
                self._job.name,
                chosen.fallback,
                chosen.fallback_reason,
            )
        self._dead_in_a_row = 0
        self._last = chosen

    def _skip(self, submission: Submission[Batch], error: JestError) -> None:
        submission.held.end("dead_lettered", error)
        self._stats.dead_lettered += 1
        self._stats.examples_loaded += len(submission.keys)
        self._dead_in_a_row += 1
        if self._dead_in_a_row > self._prefetch + _MOST_DEAD_LETTERS:
            error.add_note(
                f"{self._dead_in_a_row} super-batches in a row were set aside; this does not look like chance."
            )
            raise error
        _log.warning("going on without a super-batch: %s", error)

    def _reduce(self, submission: Submission[Batch], chosen: SubBatch) -> Batch:
        if self._take is not None:
            return self._take(submission.batch, chosen.positions)
        return take_rows(submission.batch, chosen.positions, len(submission.keys))


def _check_policy(
    policy: SelectionPolicy, *, features: bool, group_labels: bool, return_reference_embeddings: bool
) -> None:
    if policy.max_per_group is not None and not group_labels:
        raise ValueError(f"group_labels must be given: the job's policy has max_per_group={policy.max_per_group}")
    if needs_reference_model(policy):
        if not features:
            raise ValueError(f"features must be given: {describe(policy)} needs the reference model's inputs")
    elif return_reference_embeddings:
        raise ValueError(f"return_reference_embeddings must be False: {describe(policy)} uses no reference embeddings")


def _advise(error: JestError) -> None:
    if error.reason == SUPER_BATCH_CONFLICT:
        error.add_note(
            "Steps name super-batches, and a job remembers its decisions. After going back to an earlier checkpoint, "
            "or with data in another order, give SelectedBatches a prefix that was not used before."
        )
