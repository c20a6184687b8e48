"""How to select: every choice that a job makes once, validated when it is made.

The defaults are the published method (arXiv 2406.17711, section 2): learnability, sigmoid loss, sixteen chunks,
raw sums, sampling without replacement.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from typing import Any, Literal, Self, get_args

from jest_core.checks import require_choice, require_count, require_known_fields, require_number, require_positive_int
from jest_core.schedules import Schedule

Scoring = Literal["learnability", "easy_reference", "hard_learner", "uniform"]
Loss = Literal["sigmoid", "softmax", "pairwise", "per_example"]
Normalization = Literal["sum", "mean"]
Sampler = Literal["gumbel", "top_k"]
Placement = Literal["per_rank", "global"]
Precision = Literal["float32", "bfloat16"]

_CHOICES = {
    "scoring": get_args(Scoring),
    "loss": get_args(Loss),
    "normalization": get_args(Normalization),
    "sampler": get_args(Sampler),
    "placement": get_args(Placement),
    "precision": get_args(Precision),
}
# S is the sum of sign * loss over the models: (sign of the learner, sign of the reference).
_SIGNS = {
    "learnability": (1, -1),
    "easy_reference": (0, -1),
    "hard_learner": (1, 0),
    "uniform": (0, 0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionPolicy:
    """The selection rule of a training job.

    Attributes:
        scoring: what makes a pair worth choosing: `learnability` (hard for the learner, easy for the reference),
            `easy_reference`, `hard_learner`, or `uniform` (the baseline: every pair alike).
        loss: how the loss of a sub-batch comes about. `sigmoid` (SigLIP) and `softmax` (CLIP) are computed from
            embeddings. `pairwise` is any other loss that is a sum over image-text pairs: the learner brings its
            pair losses, the reference's are sigmoid losses unless it brings its own. `per_example` is a loss
            of each example by itself, brought by both: rows are then chosen independently of each other.
        sub_batch_size: b, the number of pairs to choose. Give either this or `filter_ratio`.
        filter_ratio: f, the share of the super-batch to leave out, in [0, 1): b = floor(B * (1 - f)).
        num_chunks: N, the number of steps in which the sub-batch grows. One chunk is independent selection.
        gain: factor on the logits, an inverse sampling temperature. Zero is uniform sampling.
        normalization: `sum` as published: logits grow with the number of chosen pairs, so the sampler
            sharpens from chunk to chunk; `mean` divides by the number of terms, 1 + 2 * (number chosen). The softmax
            loss is no sum over pairs, nor is a loss of single examples: there it makes no difference.
        sampler: `gumbel` samples without replacement; `top_k` takes the best, equal ones in order of position.
        placement: `per_rank` takes an equal share of every rank's own rows; `global` takes rows wherever they are.
        max_per_group: the most rows to choose of one group, such as a concept; None for no limit.
        weights: also compute what each chosen pair is worth inside the sub-batch, for learners that re-weight.
        precision: of the matrix products. `bfloat16` is faster where the hardware has it, and rounds the logits to
            8 significant bits; everything after the products stays in float32 and float64.

    `filter_ratio` and `gain` may be a `Schedule`; `at_step` gives the policy that holds at one step.
    """

    scoring: Scoring = "learnability"
    loss: Loss = "sigmoid"
    sub_batch_size: int | None = None
    filter_ratio: float | Schedule | None = None
    num_chunks: int = 16
    gain: float | Schedule = 1.0
    normalization: Normalization = "sum"
    sampler: Sampler = "gumbel"
    placement: Placement = "per_rank"
    max_per_group: int | None = None
    weights: bool = False
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name, accepted in _CHOICES.items():
            require_choice(name, getattr(self, name), accepted)
        self._require_one_size()
        require_positive_int("num_chunks", self.num_chunks)
        least, _ = _range("gain", self.gain)
        if least < 0:
            raise ValueError(f"gain ({_show(self.gain)}) must be at least 0")
        if self.sub_batch_size is not None:
            _require_chunks_fit(self.num_chunks, self.sub_batch_size)
        if self.max_per_group is not None:
            require_positive_int("max_per_group", self.max_per_group)
        if not isinstance(self.weights, bool):
            raise ValueError(f"weights ({self.weights!r}) must be true or false")  # noqa: TRY004 - bad input is always ValueError
        if self.weights and self.scoring == "easy_reference":
            raise ValueError("weights need a scoring that knows the learner's loss, not 'easy_reference'")

    @property
    def is_scheduled(self) -> bool:
        """Whether something depends on the step."""
        return isinstance(self.filter_ratio, Schedule) or isinstance(self.gain, Schedule)

    @property
    def loss_signs(self) -> tuple[int, int]:
        """The signs of the learner's and the reference's loss in a score; 0 where that model does not count."""
        return _SIGNS[self.scoring]

    @property
    def scores_learner(self) -> bool:
        """Whether the learner's losses count."""
        return self.loss_signs[0] != 0

    @property
    def scores_reference(self) -> bool:
        """Whether the reference's losses count."""
        return self.loss_signs[1] != 0

    @property
    def needs_reference_model(self) -> bool:
        """Whether a reference model has to embed the rows; losses of single examples come with the learner's."""
        return self.scores_reference and self.loss != "per_example"

    def at_step(self, step: int, super_batch_size: int, world_size: int = 1) -> Self:
        """The policy at one step, without schedules.

        A scheduled filter ratio becomes a sub-batch size. Under placement `per_rank` it is rounded down to a multiple
        of the world size, which no choice of the schedule's ends could bring about at every step.

        Raises:
            ValueError: the step is no integer of at least 0, or b at this step does not lie between `num_chunks` and B.
        """
        require_count("step", step, least=0)
        gain = self.gain.at(step) if isinstance(self.gain, Schedule) else self.gain
        if not isinstance(self.filter_ratio, Schedule):
            return replace(self, gain=gain)
        require_positive_int("world_size", world_size)
        ratio = self.filter_ratio.at(step)
        size = replace(self, gain=gain, filter_ratio=ratio).resolve_sub_batch_size(super_batch_size)
        if self.placement == "per_rank":
            size -= size % world_size
        if size < max(1, self.num_chunks):
            raise ValueError(
                f"filter_ratio ({ratio:g} at step {step}) leaves {size} of a super-batch of {super_batch_size} on "
                f"{world_size} ranks, fewer than num_chunks ({self.num_chunks})"
            )
        return replace(self, gain=gain, filter_ratio=None, sub_batch_size=size)

    def resolve_sub_batch_size(self, super_batch_size: int) -> int:
        """The number of pairs b to choose out of `super_batch_size`, in exact integer arithmetic.

        The filter ratio counts as the decimal number that was written: 0.8 is 4/5, so 163,840 pairs give 32,768,
        where floating point gives 32,767.

        Raises:
            ValueError: b does not lie between `num_chunks` and the super-batch size, or depends on the step.
        """
        require_positive_int("super_batch_size", super_batch_size)
        if self.sub_batch_size is not None:
            size = self.sub_batch_size
            if size > super_batch_size:
                raise ValueError(f"sub_batch_size ({size}) is larger than the super-batch ({super_batch_size})")
            return size
        self.require_unscheduled()
        kept = 1 - Fraction(str(self.filter_ratio))
        size = math.floor(super_batch_size * kept)
        if size < 1:
            raise ValueError(
                f"filter_ratio ({self.filter_ratio}) leaves nothing of a super-batch of {super_batch_size}"
            )
        _require_chunks_fit(self.num_chunks, size)
        return size

    def require_unscheduled(self) -> None:
        """Raise a ValueError if something depends on the step."""
        for name in ("filter_ratio", "gain"):
            if isinstance(getattr(self, name), Schedule):
                raise ValueError(f"{name} depends on the step: call policy.at_step(step, super_batch_size) first")  # noqa: TRY004 - as above

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; absent fields take their defaults.

        Raises:
            ValueError: a key is not a field, or a value is not acceptable.
        """
        require_known_fields("policy", values, [field.name for field in fields(cls)])
        scheduled = {
            name: Schedule.from_dict(values[name])
            for name in ("filter_ratio", "gain")
            if isinstance(values.get(name), Mapping)
        }
        return cls(**{**values, **scheduled})

    def _require_one_size(self) -> None:
        if (self.sub_batch_size is None) == (self.filter_ratio is None):
            raise ValueError(
                f"exactly one of sub_batch_size ({self.sub_batch_size}) and filter_ratio "
                f"({_show(self.filter_ratio)}) must be given"
            )
        if self.sub_batch_size is not None:
            require_positive_int("sub_batch_size", self.sub_batch_size)
        if self.filter_ratio is not None:
            least, largest = _range("filter_ratio", self.filter_ratio)
            if not 0 <= least <= largest < 1:
                raise ValueError(f"filter_ratio ({_show(self.filter_ratio)}) must lie in [0, 1)")


def _range(name: str, value: float | Schedule) -> tuple[float, float]:
    if isinstance(value, Schedule):
        return value.bounds()
    require_number(name, value)
    return value, value


def _show(value: object) -> str:
    return f"from {value.bounds()[0]:g} to {value.bounds()[1]:g}" if isinstance(value, Schedule) else str(value)


def _require_chunks_fit(num_chunks: int, sub_batch_size: int) -> None:
    if num_chunks > sub_batch_size:
        raise ValueError(f"num_chunks ({num_chunks}) is larger than the sub-batch ({sub_batch_size})")
