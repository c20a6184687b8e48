"""How to select: every choice that a job makes once, validated when it is made.

The defaults are the published method (arXiv 2406.17711, section 2): learnability, sigmoid loss, sixteen chunks,
raw sums, sampling without replacement.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any, Literal, Self, get_args

Scoring = Literal["learnability", "easy_reference", "hard_learner", "uniform"]
Loss = Literal["sigmoid"]
Normalization = Literal["sum", "mean"]
Sampler = Literal["gumbel", "top_k"]
Placement = Literal["per_rank", "global"]

_CHOICES = {
    "scoring": get_args(Scoring),
    "loss": get_args(Loss),
    "normalization": get_args(Normalization),
    "sampler": get_args(Sampler),
    "placement": get_args(Placement),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionPolicy:
    """The selection rule of a training job.

    Attributes:
        scoring: what makes a pair worth choosing: `learnability` (hard for the learner, easy for the reference),
            `easy_reference`, `hard_learner`, or `uniform` (the baseline: every pair alike).
        loss: the pairwise loss of the models.
        sub_batch_size: b, the number of pairs to choose. Give either this or `filter_ratio`.
        filter_ratio: f, the share of the super-batch to leave out, in [0, 1): b = floor(B * (1 - f)).
        num_chunks: N, the number of steps in which the sub-batch grows. One chunk is independent selection.
        gain: factor on the logits, an inverse sampling temperature.
        normalization: `sum` as published: logits grow with the number of chosen pairs, so the sampler
            sharpens from chunk to chunk; `mean` divides by the number of terms, 1 + 2 * (number chosen).
        sampler: `gumbel` samples without replacement; `top_k` takes the best, equal ones in order of position.
        placement: `per_rank` takes an equal share of every rank's own rows; `global` takes rows wherever they are.
    """

    scoring: Scoring = "learnability"
    loss: Loss = "sigmoid"
    sub_batch_size: int | None = None
    filter_ratio: float | None = None
    num_chunks: int = 16
    gain: float = 1.0
    normalization: Normalization = "sum"
    sampler: Sampler = "gumbel"
    placement: Placement = "per_rank"

    def __post_init__(self) -> None:
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(accepted)}")
        self._require_one_size()
        require_positive_int("num_chunks", self.num_chunks)
        _require_number("gain", self.gain)
        if self.gain <= 0:
            raise ValueError(f"gain ({self.gain}) must be larger than 0")
        if self.sub_batch_size is not None:
            _require_chunks_fit(self.num_chunks, self.sub_batch_size)

    def resolve_sub_batch_size(self, super_batch_size: int) -> int:
        """The number of pairs b to choose out of `super_batch_size`, in exact integer arithmetic.

        The filter ratio counts as the decimal number that was written: 0.8 is 4/5, so 163,840 pairs give 32,768,
        where floating point gives 32,767.

        Raises:
            ValueError: b does not lie between `num_chunks` and the super-batch size.
        """
        require_positive_int("super_batch_size", super_batch_size)
        if self.sub_batch_size is not None:
            size = self.sub_batch_size
            if size > super_batch_size:
                raise ValueError(f"sub_batch_size ({size}) is larger than the super-batch ({super_batch_size})")
            return size
        kept = 1 - Fraction(str(self.filter_ratio))
        size = math.floor(super_batch_size * kept)
        if size < 1:
            raise ValueError(
                f"filter_ratio ({self.filter_ratio}) leaves nothing of a super-batch of {super_batch_size}"
            )
        _require_chunks_fit(self.num_chunks, size)
        return size

    def to_dict(self) -> dict[str, str | int | float | None]:
        """Every field by name, as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; absent fields take their defaults.

        Raises:
            ValueError: a key is not a field, or a value is not acceptable.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"unknown policy fields: {', '.join(unknown)} (known: {', '.join(sorted(known))})")
        return cls(**values)

    def _require_one_size(self) -> None:
        if (self.sub_batch_size is None) == (self.filter_ratio is None):
            raise ValueError(
                f"exactly one of sub_batch_size ({self.sub_batch_size}) and filter_ratio ({self.filter_ratio}) "
                "must be given"
            )
        if self.sub_batch_size is not None:
            require_positive_int("sub_batch_size", self.sub_batch_size)
        if self.filter_ratio is not None:
            _require_number("filter_ratio", self.filter_ratio)
            if not 0 <= self.filter_ratio < 1:
                raise ValueError(f"filter_ratio ({self.filter_ratio}) must lie in [0, 1)")


def require_positive_int(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} ({value!r}) must be an integer of at least 1")


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} ({value!r}) must be a finite number")


def _require_chunks_fit(num_chunks: int, sub_batch_size: int) -> None:
    if num_chunks > sub_batch_size:
        raise ValueError(f"num_chunks ({num_chunks}) is larger than the sub-batch ({sub_batch_size})")
