"""What a learner computes of a super-batch: embeddings, pair losses or example losses, as the job's loss wants them.

These are one rank's share. `jest_core` has types of the same names for whole super-batches: there pair losses are
square, and the losses of learner and reference come one by one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from jest_core import Embeddings
from jest_wire.learner_outputs import OUTPUT_KINDS

if TYPE_CHECKING:
    from jest_core import SelectionPolicy

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_SAMPLED_ROWS = 16
_LENGTH_TOLERANCE = 0.01
"""Rounding to bfloat16 changes a length by less than half of this."""


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
        model_s_own = kind is Embeddings and isinstance(outputs, Mapping | tuple)
        hint = "; make it with Embeddings.from_outputs(...)" if model_s_own else ""
        raise ValueError(  # noqa: TRY004 - bad input is always ValueError
            f"{source} must be jest_trainer.{kind.__name__}, not {_type_name(outputs)}: "
            f"the job's loss is {policy.loss!r}{hint}"
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


def warn_of_embeddings(embeddings: Embeddings) -> None:
    """Warn of rows that are not normalised (of a sample), and of a scale that looks like a logarithm."""
    sample = slice(None, None, math.ceil(len(embeddings) / _SAMPLED_ROWS))
    for name in ("image", "text"):
        lengths = getattr(embeddings, name)[sample].detach().double().norm(dim=1)
        worst = lengths[(lengths - 1).abs().argmax()].item()
        if abs(worst - 1) > _LENGTH_TOLERANCE:
            warnings.warn(
                f"the learner's {name} embeddings are not normalised: a row has length {worst:.4g}, expected 1. Scores "
                "are then of other logits than the loss's, unless it takes them so as well: embed should return "
                f"torch.nn.functional.normalize({name}, dim=-1).",
                stacklevel=2,
            )
    if math.log(10) - 0.005 <= embeddings.scale <= math.log(100) + 0.005:
        warnings.warn(
            f"the learner's scale ({embeddings.scale:.4g}) looks like a logarithm: {embeddings.scale:.4g} is the log "
            f"of {math.exp(embeddings.scale):.4g}. Embeddings takes the multiplier itself: scale=logit_scale.exp().",
            stacklevel=2,
        )


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
