"""What a learner computes of a super-batch: embeddings, pair losses or example losses, as the job's loss wants them.

These are one rank's share. `jest_core` has types of the same names for whole super-batches: there pair losses are
square, and the losses of learner and reference come one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from jest_core import Embeddings
from jest_wire.learner_outputs import OUTPUT_KINDS

if TYPE_CHECKING:
    from jest_core import SelectionPolicy

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class PairLosses:
    """The learner's loss of each of this rank's images with every text of the super-batch, for loss `pairwise`.

    Row i is image i of this rank, column j is text j of the super-batch: the rows of rank 0, then those of rank 1, and
    so on. It is sent a tile at a time and may lie anywhere: on a GPU, or in a memory-mapped file. NaN and Inf are
    refused when it is sent.

    Attributes:
        values: `[rows, B]`, of any float type; float64 travels as float32.

    Raises:
        ValueError: the tensor is no matrix of floats, or has no elements.
    """

    values: Tensor

    def __post_init__(self) -> None:
        _require_floats("values", self.values, ndim=2, shape="matrix [rows, B]")
        if not self.values.numel():
            raise ValueError(f"values has shape {list(self.values.shape)}, expected at least one row and one column")

    def __len__(self) -> int:
        return self.values.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class ExampleLosses:
    """The losses of this rank's rows, each example by itself, for loss `per_example`.

    Only those that the scoring needs are sent: both for `learnability`, the learner's for `hard_learner`, the
    reference's for `easy_reference`, none for `uniform`. The others may be there or not.

    Attributes:
        learner: `[rows]`, of any float type; float64 travels as float32.
        reference: the same of a reference model; computed once for the whole dataset, say.

    Raises:
        ValueError: a tensor is no vector of floats or holds NaN or Inf, or the two differ in length.
    """

    learner: Tensor | None = None
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("learner", "reference"):
            losses = getattr(self, name)
            if losses is not None:
                _require_floats(name, losses, ndim=1, shape="vector [rows]")
                if not bool(losses.isfinite().all()):
                    raise ValueError(f"{name} must be finite: row {_first_bad(losses)[0]} holds NaN or Inf")
        if self.learner is not None and self.reference is not None and len(self.learner) != len(self.reference):
            raise ValueError(
                f"learner has {len(self.learner)} rows and reference {len(self.reference)}, expected equal"
            )


LearnerOutputs: TypeAlias = Embeddings | PairLosses | ExampleLosses
"""What `embed` returns; which of these it must be is the policy's `loss`."""

_TYPES: dict[str, type[LearnerOutputs]] = {
    "embeddings": Embeddings,
    "pair_losses": PairLosses,
    "example_losses": ExampleLosses,
}


def check_outputs(source: str, outputs: object, policy: SelectionPolicy, *, world_size: int) -> LearnerOutputs:
    """Refuse what the job's loss and scoring cannot use; `source` is what errors call it.

    Raises:
        ValueError: it is of another kind, or lacks losses that the scoring needs, or lacks columns.
    """
    kind = _TYPES[OUTPUT_KINDS[policy.loss]]
    if not isinstance(outputs, kind):
        raise ValueError(  # noqa: TRY004 - bad input is always ValueError
            f"{source} must be jest_trainer.{kind.__name__}, not {_type_name(outputs)}: "
            f"the job's loss is {policy.loss!r}"
        )
    if isinstance(outputs, ExampleLosses):
        needed = (("learner", policy.scores_learner), ("reference", policy.scores_reference))
        for model, counts in needed:
            if counts and getattr(outputs, model) is None:
                raise ValueError(f"{source} has no {model} losses, but {scoring_and_loss(policy)} needs them")
    if isinstance(outputs, PairLosses) and world_size == 1 and outputs.values.shape[1] != len(outputs):
        raise ValueError(
            f"{source} has shape {list(outputs.values.shape)}, expected one column for each of the super-batch's "
            f"{len(outputs)} rows: the job has one rank"
        )
    return outputs


def scoring_and_loss(policy: SelectionPolicy) -> str:
    """Return the two fields that decide what a policy needs, as errors name them."""
    return f"scoring {policy.scoring!r} under loss {policy.loss!r}"


def _require_floats(name: str, tensor: object, *, ndim: int, shape: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")  # noqa: TRY004 - bad input is always ValueError
    if tensor.ndim != ndim or tensor.dtype not in _DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(f"{name} must be a {shape} of {accepted}, not {tensor.dtype} of shape {list(tensor.shape)}")


def _first_bad(losses: Tensor) -> list[int]:
    first: list[int] = losses.isfinite().logical_not().nonzero()[0].tolist()
    return first


def _type_name(value: object) -> str:
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    return kind.__qualname__ if package == "builtins" else f"{package}.{kind.__qualname__}"
