"""Numbers that change with the training step: a filter ratio that rises, a gain that warms up."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from jest_core.checks import require_choice, require_count, require_known_fields, require_number

Shape = Literal["constant", "linear", "cosine"]

_DIGITS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A number as a function of the training step.

    For the first `warmup_steps` steps it rises in a straight line from 0, which means uniform sampling for a gain and
    the whole super-batch for a filter ratio, to `start`. From there it takes `steps` steps to `end`, in a straight
    line or along half a cosine, and stays there. Values are rounded to nine decimals, so that every machine's cosine
    gives the same sub-batch size.

    Attributes:
        shape: `constant`, `linear` or `cosine`.
        start: the value after the warm-up.
        end: the value in the end; only for `linear` and `cosine`.
        steps: how long the way from `start` to `end` is; only for `linear` and `cosine`.
        warmup_steps: how long the way from 0 to `start` is.
    """

    start: float
    shape: Shape = "constant"
    end: float | None = None
    steps: int | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        require_choice("shape", self.shape, get_args(Shape))
        require_number("start", self.start)
        require_count("warmup_steps", self.warmup_steps, least=0)
        if self.shape == "constant":
            for name in ("end", "steps"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} ({getattr(self, name)!r}) must be None for the shape 'constant'")
        else:
            require_number("end", self.end)
            require_count("steps", self.steps, least=1)

    def at(self, step: int) -> float:
        """The value at a step, counted from 0.

        Raises:
            ValueError: the step is not an integer of at least 0.
        """
        require_count("step", step, least=0)
        if step < self.warmup_steps:
            return round(self.start * step / self.warmup_steps, _DIGITS)
        if self.end is None or self.steps is None:
            return self.start
        progress = min((step - self.warmup_steps) / self.steps, 1.0)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return round(self.start + (self.end - self.start) * progress, _DIGITS)

    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value it ever takes."""
        values = [self.start, self.start if self.end is None else self.end]
        if self.warmup_steps:
            values.append(0.0)
        return min(values), max(values)

    def to_dict(self) -> dict[str, str | int | float | None]:
        """Every field by name, as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; absent fields take their defaults.

        Raises:
            ValueError: a key is not a field, the start is absent, or a value is not acceptable.
        """
        require_known_fields("schedule", values, [field.name for field in fields(cls)])
        if "start" not in values:
            raise ValueError("start must be given for a schedule")
        return cls(**values)
