"""What goes into a selection and what comes out of it: what one model says of the rows, and the chosen positions.

Shapes: B = super-batch, b = sub-batch, N = chunks, D = embedding width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_OUTPUT_NAMES = {
    "image": ("image_features", "image_embeds", "image"),
    "text": ("text_features", "text_embeds", "text"),
    "scale": ("logit_scale", "scale"),
    "bias": ("logit_bias", "bias"),
}
"""Where a model's output may hold what `Embeddings` takes: the names of OpenCLIP, of transformers, and our own."""


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """One model's view of a super-batch: image and text [B, D], and the scale and bias of its pair logits.

    The pair logit of image i and text j is `scale * <image_i, text_j> + bias`. Rows are used as they are, so the
    caller normalises them. `scale` is the multiplier itself (already exponentiated); a `bias` of None is no bias.

    Both may be any real number, or a tensor or array of one element on any device; they become floats. A distributed
    tensor (DTensor) is gathered, and two matrices of different dtype get the wider of both.

    Raises:
        ValueError: the tensors disagree in shape, dtype or device, hold NaN or Inf, or the scale or the
            bias is out of range, or a distributed tensor is split by rows.
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
        for name in ("image", "text"):
            object.__setattr__(self, name, _gathered(name, getattr(self, name)))
            _require_floats(name, getattr(self, name), ndim=2, shape="matrix [B, D]")
        if self.image.dtype != self.text.dtype:  # one tower in mixed precision, say
            wider = torch.promote_types(self.image.dtype, self.text.dtype)
            object.__setattr__(self, "image", self.image.to(wider))
            object.__setattr__(self, "text", self.text.to(wider))
        for attribute in ("shape", "device"):
            ours, theirs = getattr(self.image, attribute), getattr(self.text, attribute)
            if ours != theirs:
                raise ValueError(f"image and text must have the same {attribute}: {_show(ours)} and {_show(theirs)}")
        _require_finite("image", self.image)
        _require_finite("text", self.text)

    @classmethod
    def from_outputs(cls, outputs: object, *, scale: object = None, bias: object = None) -> "Embeddings":
        """Take the embeddings out of what a model returned.

        Args:
            outputs: a mapping or an object with `image_features`, `text_features`, `logit_scale` and possibly
                `logit_bias` (OpenCLIP), or with `image_embeds` and `text_embeds` (transformers); or a tuple of image,
                text, scale and possibly bias, the last two of which may be left out if `scale` is given.
            scale: counts instead of the scale in `outputs`; must be given if there is none.
            bias: counts instead of the bias in `outputs`.

        Raises:
            ValueError: something is not found, or is not what `Embeddings` takes.
        """
        found = _found_in(outputs)
        for name, given in (("scale", scale), ("bias", bias)):
            if given is not None:
                found[name] = given
        for name in ("image", "text", "scale"):
            if found.get(name) is None:
                hint = "; give it as scale=model.logit_scale.exp()" if name == "scale" else ""
                names = ", ".join(_OUTPUT_NAMES[name])
                raise ValueError(f"{name} is not in the outputs ({_describe(outputs)}), expected one of {names}{hint}")
        return cls(**found)

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


def _as_float(name: str, value: Any) -> float:
    if value is None and name == "bias":
        return 0.0
    if isinstance(value, Tensor):
        value = _gathered(name, value).detach()
    if hasattr(value, "item") and hasattr(value, "shape"):  # a tensor, a NumPy array or a NumPy scalar
        if math.prod(value.shape) != 1:
            raise ValueError(f"{name} must be a single number, not a tensor of shape {_show(value.shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} ({value!r}) must be a number")  # noqa: TRY004 - bad input is always ValueError
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} ({value}) must be finite")
    return number


def _gathered(name: str, tensor: Any) -> Any:
    """Return a distributed tensor as a whole, a collective call of its mesh; others as they are.

    Whole is what every rank has of it (tensor parallelism). Where it is split by rows, its own rows are meant, and
    whether those are the rows of the rank's batch only the caller knows.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    if tensor.ndim > 1 and any(
        placement.is_shard(0) and tensor.device_mesh.size(dim) > 1 for dim, placement in enumerate(tensor.placements)
    ):
        raise ValueError(
            f"{name} is a DTensor split by rows over {tensor.device_mesh.size()} ranks, expected this rank's rows: "
            f"use {name}.to_local() if those are its rows, {name}.full_tensor() if every rank has all of them"
        )
    return tensor.full_tensor()


def _found_in(outputs: object) -> dict[str, Any]:
    """Return what a model's output holds, by the names of the fields of `Embeddings`."""
    named = outputs if isinstance(outputs, Mapping) else None
    if named is None and isinstance(outputs, tuple | list) and not hasattr(outputs, "_fields"):
        if not 2 <= len(outputs) <= 4:
            raise ValueError(
                f"outputs have {len(outputs)} elements, expected image, text, scale and possibly bias: "
                "take them out and call Embeddings(image, text, scale, bias)"
            )
        return dict(zip(_OUTPUT_NAMES, outputs, strict=False))
    found: dict[str, Any] = {}
    for field, names in _OUTPUT_NAMES.items():
        for name in names:
            value = getattr(outputs, name, None) if named is None else named.get(name)
            if value is not None:
                found[field] = value
                break
    return found


def _describe(outputs: object) -> str:
    kind = type(outputs).__name__
    return f"{kind} with {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else kind


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
    return str(list(value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")
