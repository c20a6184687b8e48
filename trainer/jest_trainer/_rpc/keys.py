"""Example keys, group labels and sources as the contract wants them: one string for each row, whatever one holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable


def key_strings(keys: Iterable[Any]) -> list[str]:
    """Example keys as the contract wants them; integers, also in tensors and arrays, become their decimal form.

    Raises:
        ValueError: there are none, or one is neither a string nor an integer.
    """
    values = _values("keys", "key", keys)
    if not values:
        raise ValueError("keys is empty, expected one key for each row of the super-batch")
    return [_string("keys", row, key) for row, key in enumerate(values)]


def label_strings(labels: Iterable[Any], rows: int) -> list[str]:
    """Group labels as the contract wants them, one for each row; None becomes the empty string, which is no group.

    Raises:
        ValueError: there are more or fewer than rows, or one is neither a string nor an integer nor None.
    """
    values = _values("group_labels", "label", labels)
    if len(values) != rows:
        raise ValueError(f"group_labels has {len(values)} labels for a super-batch with {rows} keys")
    return ["" if label is None else _string("group_labels", row, label) for row, label in enumerate(values)]


def source_strings(sources: Iterable[Any], rows: int) -> list[str]:
    """Sources as the contract wants them, one for each row; None becomes the empty string: that row is uploaded.

    Raises:
        ValueError: there are more or fewer than rows, or one is neither a string nor None.
    """
    values = _values("sources", "source", sources)
    if len(values) != rows:
        raise ValueError(f"sources has {len(values)} sources for a super-batch with {rows} keys")
    for row, source in enumerate(values):
        if source is not None and not isinstance(source, str):
            raise ValueError(f"sources[{row}] ({source!r}) must be a string or None, not {type(source).__name__}")
    return ["" if source is None else source for source in values]


def _values(name: str, noun: str, values: Iterable[Any]) -> list[Any]:
    if isinstance(values, str | bytes):
        raise ValueError(f"{name} must hold one {noun} for each row, not be a single string")  # noqa: TRY004 - bad input is always ValueError
    listed: list[Any] = values.tolist() if isinstance(values, torch.Tensor | np.ndarray) else list(values)
    return listed


def _string(name: str, row: int, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | np.integer):
        raise ValueError(f"{name}[{row}] ({value!r}) must be a string or an integer, not {type(value).__name__}")  # noqa: TRY004 - as above
    return str(value)
