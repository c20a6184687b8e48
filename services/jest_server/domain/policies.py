"""Selection policies in plain JSON types, as the REST interface takes them and jobs and decisions record them.

They declare the plain values of `jest_wire.policies`, which gives them meaning: this file converts nothing itself.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from jest_core.policy import Loss, Normalization, Placement, Precision, Sampler, Scoring
from jest_core.schedules import Shape
from jest_server.domain.frozen_model import FrozenModel
from jest_wire.policies import policy_from_values

if TYPE_CHECKING:
    from jest_core import SelectionPolicy

Fallback = Literal["fail", "uniform", "hard_learner"]


class ScheduleSpec(FrozenModel):
    """A number that depends on the training step."""

    shape: Shape = "constant"
    start: float
    end: float | None = None
    steps: int | None = None
    warmup_steps: int = 0


class PolicySpec(FrozenModel):
    """A selection policy; what its fields have to do with each other is checked when a job is created."""

    scoring: Scoring = "learnability"
    loss: Loss = "sigmoid"
    sub_batch_size: int | None = Field(default=None, ge=1)
    filter_ratio: str | None = None
    filter_ratio_schedule: ScheduleSpec | None = None
    num_chunks: int = Field(default=16, ge=1)
    gain: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Ignored where there is a gain_schedule."""
    gain_schedule: ScheduleSpec | None = None
    normalization: Normalization = "sum"
    sampler: Sampler = "gumbel"
    placement: Placement = "per_rank"
    max_per_group: int | None = Field(default=None, ge=1)
    weights: bool = False
    precision: Precision = "float32"


@lru_cache
def policy_of(spec: PolicySpec) -> SelectionPolicy:
    """Return the policy that a recorded one describes; cached, since every call of a job asks for it.

    Raises:
        ValueError: The combination makes no sense; the message names field, value and expectation.
    """
    return policy_from_values(spec.model_dump(exclude_none=True))
