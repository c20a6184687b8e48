"""What goes into a selection and what comes out of it: what one model says of the rows, and the chosen positions.

Shapes: B = super-batch, b = sub-batch, N = chunks, D = embedding width.
"""

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """One model's view of a super-batch: image and text [B, D], and the scale and bias of its pair logits.

    The pair logit of image i and text j is `scale * <image_i, text_j> + bias`. Rows are used as they are:
    whoever embeds them normalises them. `scale` is the multiplier itself (already exponentiated), and models
    without a bias leave it at zero. Tensors of one element are accepted for both and become floats.

    Raises:
        ValueError: the tensors disagree in shape, dtype or device, hold NaN or Inf, or the scale or the
            bias is out of range.
    """

    image: Tensor
    text: Tensor
    scale: float
    bias: float = 0.0

    def __post_init__(self) -> None:
        for name in ("scale", "bias"):
            object.__setattr__(self, name, _as_float(name, getattr(self, name)))
        if self.scale <= 0:
            raise ValueError(f"scale ({self.scale}) must be larger than 0")
        _require_floats("image", self.image, ndim=2, shape="matrix [B, D]")
        _require_floats("text", self.text, ndim=2, shape="matrix [B, D]")
        for attribute in ("shape", "dtype", "device"):
            ours, theirs = getattr(self.image, attribute), getattr(self.text, attribute)
            if ours != theirs:
                raise ValueError(f"image and text must have the same {attribute}: {_show(ours)} and {_show(theirs)}")
        _require_finite("image", self.image)
        _require_finite("text", self.text)

    def __len__(self) -> int:
        return self.image.shape[0]

    @property
    def device(self) -> torch.device:
        """Where both matrices are."""
        return self.image.device

    def to(self, device: torch.device | str) -> "Embeddings":
        """The same embeddings on another device."""
        return replace(self, image=self.image.to(device), text=self.text.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class PairLosses:
    """One model's loss of every image-text pair: a matrix [B, B], image i with text j in row i and column j.

    For a model whose loss is a sum over pairs, but not the sigmoid of embeddings. The matrix may be larger than memory:
    only rows and columns of chosen pairs are read, a tile at a time, so a memory-mapped one will do.

    Raises:
        ValueError: the matrix is not square, or not of float32, float16 or bfloat16.
    """

    values: Tensor

    def __post_init__(self) -> None:
        _require_floats("values", self.values, ndim=2, shape="matrix [B, B]")
        if self.values.shape[0] != self.values.shape[1]:
            raise ValueError(f"values must be a square matrix [B, B], not of shape {_show(self.values.shape)}")

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return self.values.device

    def to(self, device: torch.device | str) -> "PairLosses":
        """The same losses on another device."""
        return replace(self, values=self.values.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class ExampleLosses:
    """One model's loss of every example by itself, [B].

    Raises:
        ValueError: the tensor is no vector of float32, float16 or bfloat16, or holds NaN or Inf.
    """

    values: Tensor

    def __post_init__(self) -> None:
        _require_floats("values", self.values, ndim=1, shape="vector [B]")
        _require_finite("values", self.values[:, None])

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the losses are."""
        return self.values.device

    def to(self, device: torch.device | str) -> "ExampleLosses":
        """The same losses on another device."""
        return replace(self, values=self.values.to(device))


ModelOutputs: TypeAlias = Embeddings | PairLosses | ExampleLosses
"""What a model says of a super-batch; which of these it must be is the policy's `loss`."""


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """A chosen sub-batch.

    Attributes:
        positions: int64 [b] on the CPU, rows of the super-batch in order of choice, no row twice.
        chunk_boundaries: N + 1 offsets into `positions`, from 0 to b; chunk n is what lies between offsets
            n and n + 1.
        perplexity: for each chunk, the exponential of the Shannon entropy (nats) of the softmax over the rows
            that could still be chosen: how many rows the sampler really chose among. Near 1, it is greedy.
        weights: float32 [b] on the CPU, what each chosen row is worth for the learner, in the order of `positions`;
            None unless the policy asks for it. It is the row's score, of all its pairs inside the sub-batch and of
            nothing else, where that is positive and 0 elsewhere, divided by the mean: the weights' mean is 1. Where
            no score is positive, and under scoring `uniform`, every weight is 1.
        mean_own_scores: of the rows chosen and of the rows dropped, the mean of the score of a row's own pair, before
            anything is chosen: how much better the one are than the other. NaN for no rows.
    """

    positions: Tensor
    chunk_boundaries: tuple[int, ...]
    perplexity: tuple[float, ...]
    weights: Tensor | None = None
    mean_own_scores: tuple[float, float] = (math.nan, math.nan)


def _as_float(name: str, value: object) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a single number, not a tensor of shape {_show(value.shape)}")
        value = value.detach().item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} ({value!r}) must be a number")  # noqa: TRY004 - bad input is always ValueError
    if not math.isfinite(value):
        raise ValueError(f"{name} ({value}) must be finite")
    return float(value)


def _require_floats(name: str, tensor: Tensor, *, ndim: int, shape: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")  # noqa: TRY004 - bad input is always ValueError
    if tensor.ndim != ndim or tensor.numel() == 0:
        raise ValueError(f"{name} must be a non-empty {shape}, not of shape {_show(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        accepted = ", ".join(_show(dtype) for dtype in DTYPES)
        raise ValueError(f"{name} must have one of the dtypes {accepted}, not {_show(tensor.dtype)}")


def _require_finite(name: str, matrix: Tensor) -> None:
    # The extremes carry NaN and Inf, and need no B x D values as isfinite() does; over all elements they are fastest.
    if all(extreme.isfinite() for extreme in torch.aminmax(matrix.detach())):
        return
    lowest, highest = torch.aminmax(matrix.detach(), dim=1)
    row = int((lowest.isfinite() & highest.isfinite()).logical_not().nonzero()[0])
    raise ValueError(f"{name} must be finite: row {row} holds NaN or Inf")


def _show(value: object) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value).removeprefix("torch.")
