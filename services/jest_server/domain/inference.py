"""What an adapter tells about every inference it makes, for whoever keeps metrics."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Outcome(StrEnum):
    """What became of one inference request."""

    OK = "ok"
    BUSY = "busy"
    """The model's queue was full."""
    UNAVAILABLE = "unavailable"
    """Nobody answered, or the connection was lost."""
    TIMEOUT = "timeout"
    REFUSED = "refused"
    """The request is wrong and stays so."""
    FAILED = "failed"
    BROKEN_OUTPUT = "broken_output"
    """An answer came, of a wrong type, shape or size, not finite, or with norms that no embedding has."""


InferenceObserver = Callable[[int, float, Outcome], None]
"""Called with examples, seconds and outcome, once for each request, repeated ones too."""


def ignore(examples: int, seconds: float, outcome: Outcome) -> None:
    """Observes nothing."""
