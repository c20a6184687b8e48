"""Selection policies and schedules in plain JSON types, as jobs and decisions record them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jest_core import Schedule, SelectionPolicy
from jest_server.domain.frozen_model import FrozenModel

Fallback = Literal["fail", "uniform", "hard_learner"]


class ScheduleSpec(FrozenModel):
    """A number that depends on the step, in plain JSON types; jest_core gives it meaning."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    start: float
    end: float | None = None
    steps: int | None = None
    warmup_steps: int = 0


class PolicySpec(FrozenModel):
    """A selection policy in plain JSON types; jest_core gives it meaning and checks the combinations."""

    scoring: Literal["learnability", "easy_reference", "hard_learner", "uniform"] = "learnability"
    loss: Literal["sigmoid", "softmax", "pairwise", "per_example"] = "sigmoid"
    sub_batch_size: int | None = Field(default=None, ge=1)
    filter_ratio: str | None = None
    filter_ratio_schedule: ScheduleSpec | None = None
    num_chunks: int = Field(default=16, ge=1)
    gain: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Left alone where there is a gain_schedule."""
    gain_schedule: ScheduleSpec | None = None
    normalization: Literal["sum", "mean"] = "sum"
    sampler: Literal["gumbel", "top_k"] = "gumbel"
    placement: Literal["per_rank", "global"] = "per_rank"
    max_per_group: int | None = Field(default=None, ge=1)
    weights: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"

    @property
    def scores_learner(self) -> bool:
        """Whether what the learner says of the rows counts."""
        return self.scoring in {"learnability", "hard_learner"}

    @property
    def scores_reference(self) -> bool:
        """Whether the reference's losses count."""
        return self.scoring in {"learnability", "easy_reference"}

    @property
    def needs_reference_model(self) -> bool:
        """Whether the server has to embed the rows; losses of single examples come with the learner's."""
        return self.scores_reference and self.loss != "per_example"

    @property
    def is_scheduled(self) -> bool:
        """Whether something depends on the step."""
        return self.filter_ratio_schedule is not None or self.gain_schedule is not None


_NAMES_APART = {"filter_ratio", "filter_ratio_schedule", "gain", "gain_schedule"}


def policy_of(spec: PolicySpec) -> SelectionPolicy:
    """Gives a recorded policy its meaning.

    Raises:
        ValueError: If the combination makes no sense; the message names field, value and expectation.
    """
    ratio = spec.filter_ratio_schedule
    fixed_ratio = None if spec.filter_ratio is None else float(spec.filter_ratio)
    return SelectionPolicy(
        **spec.model_dump(exclude=_NAMES_APART),
        filter_ratio=fixed_ratio if ratio is None else schedule_of(ratio),
        gain=spec.gain if spec.gain_schedule is None else schedule_of(spec.gain_schedule),
    )


def schedule_of(spec: ScheduleSpec) -> Schedule:
    """Gives a recorded schedule its meaning.

    Raises:
        ValueError: If its fields do not fit together; the message names field, value and expectation.
    """
    return Schedule(**spec.model_dump())
