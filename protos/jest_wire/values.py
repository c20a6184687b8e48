"""Enum names, durations and timestamps, to messages and back."""

from __future__ import annotations

from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


class FieldError(ValueError):
    """A message's field is invalid; `field` is its path, with which the error text begins."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}{problem}")
        self.field = field


def enum_value(enum: Any, name: str) -> Any:
    """Return the number of a name: `hard_learner` of Scoring is SCORING_HARD_LEARNER."""
    return enum.Value(f"{_prefix(enum)}{name.upper()}")


def enum_name(enum: Any, value: int, field: str) -> str:
    """Return the name of a number, the inverse of `enum_value`.

    Raises:
        FieldError: This version does not know the number; the error calls it `field`.
    """
    if value not in enum.values():
        known = ", ".join(name for name, number in sorted(enum.items(), key=lambda item: item[1]) if number)
        raise FieldError(field, f" is {value}, expected one of {known}")
    return str(enum.Name(value).removeprefix(_prefix(enum)).lower())


def enum_name_or_number(enum: Any, value: int) -> str:
    """Return the name of a number, or the number itself as text where a newer peer may send values unknown here."""
    return enum_name(enum, value, "") if value in enum.values() else str(value)


def duration(seconds: float) -> Duration:
    """Return seconds as a message."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def timestamp(seconds: float) -> Timestamp:
    """Return seconds since 1970 as a message."""
    message = Timestamp()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def seconds(message: Duration) -> float:
    """Return a duration in seconds."""
    return message.ToNanoseconds() / 1e9


def _prefix(enum: Any) -> str:
    return f"{enum.DESCRIPTOR.name.upper()}_"
