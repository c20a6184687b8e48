"""The few checks that several types share; each names the field, the value and what was expected."""

import math
from collections.abc import Iterable


def require_choice(name: str, value: object, accepted: Iterable[str]) -> None:
    """Raise a ValueError unless `value` is one of the accepted words."""
    if value not in tuple(accepted):
        raise ValueError(f"{name} ({value!r}) must be one of {', '.join(accepted)}")


def require_count(name: str, value: object, *, least: int) -> None:
    """Raise a ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} ({value!r}) must be an integer of at least {least}")


def require_positive_int(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is an integer of at least 1."""
    require_count(name, value, least=1)


def require_number(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} ({value!r}) must be a finite number")


def require_known_fields(owner: str, values: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError if a key is none of the known fields."""
    known = sorted(known)
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ValueError(f"unknown {owner} fields: {', '.join(unknown)} (known: {', '.join(known)})")
