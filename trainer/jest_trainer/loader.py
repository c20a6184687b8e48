"""The loop: super-batches in, the sub-batches worth training on out.

Loading, submitting and uploading run in a background thread, some super-batches ahead, so that the reference model
works while the learner trains. Only the learner's forward pass cannot be prefetched: it must use the current weights.
"""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, get_args

from jest_core import Schedule
from jest_trainer._loop.distributed import resolve_rank
from jest_trainer._loop.loader_shape import LoaderShape
from jest_trainer._loop.prefetch import Prefetch
from jest_trainer._loop.read_batch import BatchReader
from jest_trainer._loop.select import SubBatchSelector
from jest_trainer._loop.stats import Accounts, Stats
from jest_trainer._loop.submit import Submission, Submitter
from jest_trainer._rpc.deadlines import Cancellation
from jest_trainer._rpc.encode_outputs import WireDtype
from jest_trainer.errors import SUPER_BATCH_CONFLICT, JestError
from jest_trainer.outputs import scoring_and_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType

    from torch import Tensor

    from jest_trainer._rpc.features import Array
    from jest_trainer.job import Job
    from jest_trainer.outputs import LearnerOutputs
    from jest_trainer.results import SubBatch

_MAX_DEAD_LETTERS = 8
"""How many super-batches in a row, beyond those that were prefetched together, may end without a decision."""
_PREFIX = re.compile(r"[A-Za-z0-9._:-]{0,64}")

Batch = TypeVar("Batch")


class SelectedBatches(LoaderShape, Generic[Batch]):
    """An iterable of super-batches, each reduced to the rows that the job's policy chose of it.

    Each `for` loop is a new pass over `super_batches`; leaving it stops its background thread. Steps go on counting
    from pass to pass, and name the super-batches: `{prefix}{step:08d}`, the same on every rank; they are also the steps
    of the policy's schedules. All ranks must see equally many super-batches, and each must hold the same rows
    whenever it is loaded again under the same name.

    `keys`, `group_labels` and `features` are called in the background thread and `super_batches` is iterated there:
    give random augmentations a generator of their own. `embed` is called in the loop's thread, without gradients,
    between two training steps, with the model in whatever mode (train or eval) it is in; the reduced batch is what
    `embed` saw.

    It has the shape of the loader that it wraps. `len()` is the wrapped loader's: the super-batches, and so the batches
    that come out, of a whole pass. Fewer come out of a pass that begins at a later step, and where super-batches are
    dead-lettered. `batch_size` is that of the batches that come out. `dataset`, `sampler`, `batch_sampler`,
    `num_batches` and `num_samples` are the wrapped loader's and describe what is loaded. `set_epoch` reaches that
    loader, its samplers and its dataset.

    `with_decisions()` or `decision_key` give the decision behind each batch: its weights, for example. A consumer may
    read ahead; `embed` then works with weights that are as many steps old, and `state_dict()` counts what was read.

    Args:
        job: from `Client.create_job` or `Client.get_job`.
        super_batches: anything that yields batches; a DataLoader, for instance.
        keys: one key for each row, strings or integers: the example's permanent name in the reference cache.
        embed: what the learner makes of all rows. Under the losses `sigmoid` and `softmax` its `Embeddings`, normalised
            as its loss takes them, with its current scale and bias; under `pairwise` its `PairLosses`; under
            `per_example` the `ExampleLosses`.
        features: the reference model's inputs by name, a row for each key. Only called when the server lacks some. Must
            be given if the policy needs a reference model.
        sources: where each row's example is, `URL.tar#KEY` or the URL of a picture, for the server to read what it
            lacks itself; None for a row that is uploaded. With it, `features` need only be given for such rows.
        group_labels: the group of each row, such as a concept: a string or an integer, None for a row of no group.
            Must be given if the policy has `max_per_group`.
        take: reduces a batch to the rows at the given positions (int64, on the CPU); None handles the usual makes.
        rank: None asks torch.distributed.
        prefetch: how many super-batches to submit ahead, the same on every rank.
        prefix: distinguishes super-batches that have equal steps and other rows, such as `"epoch0-"`.
        wire_dtype: element type in which the learner's outputs are sent; the decision is made from what is sent.
        return_reference_embeddings: ask for the chosen rows' reference embeddings, found in the decision.
        decision_key: put each batch's decision, a `SubBatch`, into the batch under this key. Batches must then be
            dictionaries.

    Raises:
        ValueError: a value is invalid.
    """

    def __init__(  # noqa: PLR0913 - all that a loop decides; the last eleven have defaults
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
        decision_key: str | None = None,
    ) -> None:
        super().__init__(super_batches)
        _require_options(job, prefetch=prefetch, prefix=prefix, wire_dtype=wire_dtype, decision_key=decision_key)
        if return_reference_embeddings and not job.policy.needs_reference_model:
            raise ValueError(
                "return_reference_embeddings must be False: "
                f"{scoring_and_loss(job.policy)} uses no reference embeddings"
            )
        self._reader = BatchReader(
            keys=keys,
            embed=embed,
            features=features,
            sources=sources,
            group_labels=group_labels,
            take=take,
            decision_key=decision_key,
        )
        self._reader.require_inputs_of(job.policy)
        self._job = job
        self._prefetch = prefetch
        self._accounts = Accounts()
        self._submitter = Submitter(job, self._reader, resolve_rank(rank, job.world_size), prefix)
        self._selector = SubBatchSelector(
            job,
            self._reader,
            self._submitter,
            self._accounts,
            wire_dtype=wire_dtype,
            return_reference_embeddings=return_reference_embeddings,
            max_dead_letters=prefetch + _MAX_DEAD_LETTERS,
        )
        self._next_step = 0
        self._unused_step = 0
        self._pass: Prefetch[Any, Submission[Batch]] | None = None

    @property
    def stats(self) -> Stats:
        """A copy of the accounts so far."""
        return replace(self._accounts.stats)

    @property
    def batch_size(self) -> int | None:
        """Rows of a batch that comes out on this rank; None where batches differ in size or the loader does not say.

        They differ in size if the filter ratio has a schedule, and between ranks under placement `global`.

        Raises:
            ValueError: the policy leaves too little of the loader's `batch_size`.
        """
        policy, ranks = self._job.policy, self._job.world_size
        if isinstance(policy.filter_ratio, Schedule) or (policy.placement == "global" and ranks > 1):
            return None
        if policy.sub_batch_size is not None:
            return policy.sub_batch_size // ranks
        loaded = super().batch_size
        return None if loaded is None else policy.resolve_sub_batch_size(loaded * ranks) // ranks

    def with_decisions(self) -> DecidedBatches[Batch]:
        """The same loop over pairs of a batch and the decision behind it, also if the consumer reads ahead."""
        return DecidedBatches(self, self._pairs)

    def state_dict(self) -> dict[str, int]:
        """Where the loop is: the step after the batch that was yielded last. Belongs into the checkpoint."""
        return {"next_step": self._next_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at a recorded step; `super_batches` must start with that step's super-batch.

        A job remembers its decisions: a loop that returns to steps which were decided with other weights or rows needs
        another `prefix`.

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
        yield from map(itemgetter(0), self._pairs())  # a loop variable would keep the last batch

    def _pairs(self) -> Iterator[tuple[Batch, SubBatch]]:
        self.close()
        current = self._pass = self._begin()
        try:
            while (submission := self._next(current)) is not None:
                submission.span.waited("sdk.wait_turn")
                with submission.span.ending("selected"):
                    decision = self._selector.select(submission)
                    self._next_step = self._unused_step = submission.step + 1
                    if decision is None:
                        continue
                    sub_batch = self._reader.reduce(submission.batch, len(submission.keys), decision)
                del submission  # while its sub-batch is trained on, the super-batch need not stay in memory
                yield sub_batch, decision
                del sub_batch, decision
            self._pass = None
        except JestError as error:
            if error.reason == SUPER_BATCH_CONFLICT:
                error.add_note(
                    "Steps name super-batches, and a job remembers its decisions. After going back to an earlier "
                    "checkpoint, or with data in another order, give SelectedBatches a prefix that was not used before."
                )
            raise
        finally:
            self._end(current)

    def _begin(self) -> Prefetch[Any, Submission[Batch]]:
        """Start a pass: its background thread submits super-batches as they are loaded."""
        self._accounts.begin_pass()
        cancellation, waiting = Cancellation(), threading.Event()
        return Prefetch(
            enumerate(self._wrapped, self._unused_step),
            lambda numbered: self._submitter.submit_ahead(*numbered, cancellation, waiting.is_set),
            limit=self._prefetch,
            name=f"jest-submit-{self._job.name}",
            waiting=waiting,
            cancel=cancellation.cancel,
            drop=lambda submission: submission.span.end("abandoned"),
        )

    def _next(self, current: Prefetch[Any, Submission[Batch]]) -> Submission[Batch] | None:
        with self._accounts.timing("submit_wait_seconds"):
            return next(current, None)

    def _end(self, current: Prefetch[Any, Submission[Batch]]) -> None:
        current.close()
        if self._pass is current:
            self._pass = None
            # Left early: the ids of what was submitted ahead are taken, and how far that went differs between ranks.
            self._unused_step = self._next_step + self._prefetch + 1


class DecidedBatches(LoaderShape, Generic[Batch]):
    """`SelectedBatches` as pairs of a batch and the `SubBatch` behind it, in other respects the same loader."""

    def __init__(self, loop: SelectedBatches[Batch], pairs: Callable[[], Iterator[tuple[Batch, SubBatch]]]) -> None:
        super().__init__(loop)
        self._pairs = pairs

    def __iter__(self) -> Iterator[tuple[Batch, SubBatch]]:
        return self._pairs()


def _require_options(job: Job, *, prefetch: int, prefix: str, wire_dtype: str, decision_key: object) -> None:
    if prefetch < 1:
        raise ValueError(f"prefetch ({prefetch}) must be at least 1")
    if not _PREFIX.fullmatch(prefix):
        raise ValueError(f"prefix ({prefix!r}) must be at most 64 characters of [A-Za-z0-9._:-]")
    if wire_dtype not in get_args(WireDtype):
        raise ValueError(f"wire_dtype ({wire_dtype!r}) must be one of {', '.join(get_args(WireDtype))}")
    if decision_key is not None and not (isinstance(decision_key, str) and decision_key):
        raise ValueError(f"decision_key ({decision_key!r}) must be a non-empty string or None")
    if job.fallback != "fail" and job.reference_timeout_s >= job.deadline_s:
        raise ValueError(
            f"the client's deadline_s ({job.deadline_s:g}) must be larger than the job's reference_timeout_s "
            f"({job.reference_timeout_s:g}), or its fallback {job.fallback!r} never gets its turn"
        )
