"""Reduces a batch of any type to chosen rows.

Rows are the first dimension of tensors and arrays, wherever they sit in dictionaries, lists, tuples, named tuples and
dataclasses. Whatever has no rows (a scalar, a name, a tensor of another length) passes through as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

Batch = TypeVar("Batch")


def take_rows(batch: Batch, positions: torch.Tensor, rows: int) -> Batch:
    """Keep the rows at `positions` (int64, on the CPU), in that order; the batch itself is left as it is.

    A list or tuple as long as the batch is a column with one entry per row (captions, say), unless each of its entries
    holds `rows` rows itself: then it is a container, as a pair `(image, text)` of a super-batch of two is.

    Raises:
        ValueError: nothing in the batch has `rows` rows.
    """
    taker = _Taker(positions, rows)
    reduced: Batch = taker.take(batch)
    if not taker.found:
        raise ValueError(
            f"nothing in the batch ({type(batch).__name__}) has {rows} rows as its first dimension, one per key; "
            "reduce it yourself with take=lambda batch, positions: ..."
        )
    return reduced


class _Taker:
    """One walk through a batch; `found` says whether it met rows."""

    def __init__(self, positions: torch.Tensor, rows: int) -> None:
        self.found = False
        self._positions = positions
        self._rows = rows
        self._indices: list[int] = positions.tolist()

    def take(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor | np.ndarray):
            return self._array(value)
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, list | tuple):
            return self._sequence(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._dataclass(value)
        return value

    def _array(self, value: Any) -> Any:
        if not self._has_rows(value):
            return value
        self.found = True
        if isinstance(value, torch.Tensor):
            return value[self._positions.to(value.device)]
        return value[self._positions.numpy()]

    def _mapping(self, value: Any) -> Any:
        reduced = {key: self.take(item) for key, item in value.items()}
        if type(value) is dict:
            return reduced
        like = copy.copy(value)
        for key, item in reduced.items():
            like[key] = item
        return like

    def _sequence(self, value: Any) -> Any:
        if len(value) == self._rows and not all(self._has_rows(item) for item in value):
            self.found = True
            return _rebuilt(value, [value[index] for index in self._indices])
        return _rebuilt(value, [self.take(item) for item in value])

    def _dataclass(self, value: Any) -> Any:
        like = copy.copy(value)
        for field in dataclasses.fields(value):
            # Not replace(): it would run __post_init__ again and refuse fields that are not of __init__.
            object.__setattr__(like, field.name, self.take(getattr(value, field.name)))
        return like

    def _has_rows(self, value: object) -> bool:
        if isinstance(value, torch.Tensor | np.ndarray):
            return value.ndim > 0 and value.shape[0] == self._rows
        if isinstance(value, Mapping):
            return any(map(self._has_rows, value.values()))
        return isinstance(value, list | tuple) and len(value) == self._rows


def _rebuilt(value: Any, items: list[Any]) -> Any:
    make: Callable[[list[Any]], Any] = getattr(type(value), "_make", type(value))  # named tuples have _make
    return make(items)
