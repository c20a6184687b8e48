"""Reduces a batch of any type to chosen rows, or refuses it and names the column.

What counts as rows, in a super-batch of B rows:

- A tensor or an array has rows if its first dimension is B; sparse COO and nested tensors as well.
- A dictionary, a named tuple and a dataclass hold columns, each reduced by itself.
- A list, a tuple or another sequence of B entries is a column with one entry per row (captions, token lists,
  records). It holds columns instead if each entry has B rows itself and they differ in kind, as in the pair
  `(image, captions)` of a super-batch of two. If they are all alike (64 lists of 64 tokens) both readings fit, and it
  is refused.
- A sequence of another length holds columns.
- A scalar, a string, None, and a tensor or a sequence of another length pass through as they are.
- Refused are columns of a multiple of B entries (five captions per image in one long list), and whatever has B entries
  but is of a type that cannot be reduced (a set, a DataFrame).
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from numbers import Number
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

Batch = TypeVar("Batch")

_LEAVES = (str, bytes, bytearray, torch.Size, Number, np.generic, type(None), type, types.FunctionType, torch.nn.Module)
"""What never has rows, whatever its length."""


def take_rows(batch: Batch, positions: torch.Tensor, rows: int) -> Batch:
    """Keep the rows at `positions` (int64, on the CPU), in that order; the batch itself is left as it is.

    The module's description says what counts as rows.

    Raises:
        ValueError: a column can be read in two ways or is of a type that cannot be reduced, or nothing in the batch has
            `rows` rows.
    """
    taker = _Taker(positions, rows)
    reduced: Batch = taker.take(batch, "batch")
    if not taker.found:
        raise ValueError(
            f"nothing in the batch ({type(batch).__name__}) has {rows} rows as its first dimension, one per key; "
            "reduce it yourself with take=lambda batch, positions: ..."
        )
    return reduced


class _Taker:
    """One walk through a batch; `found` says whether it met rows. `path` is what errors call a value."""

    def __init__(self, positions: torch.Tensor, rows: int) -> None:
        self.found = False
        self._positions = positions
        self._rows = rows
        self._indices: list[int] = positions.tolist()

    def take(self, value: Any, path: str) -> Any:
        if isinstance(value, _LEAVES):
            return value
        if isinstance(value, torch.Tensor | np.ndarray):
            return self._array(value, path)
        if isinstance(value, PackedSequence):
            self._refuse(path, value, "is packed by time step: give the padded tensor and its lengths")
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            return self._with_attributes(value, {name: getattr(value, name) for name in names}, path)
        if isinstance(value, Sequence):
            return self._sequence(value, path)
        return self._unknown(value, path)

    def _array(self, value: Any, path: str) -> Any:
        if hasattr(value, "full_tensor") and value.ndim > 0:
            self._refuse(path, value, f"is distributed: put {path}.to_local() or {path}.full_tensor() into the batch")
        length = _length(value)
        if length != self._rows:
            self._require_no_multiple(value, length, path)
            return value
        self.found = True
        if isinstance(value, np.ndarray):
            return value[self._positions.numpy()]
        if value.is_nested:
            return _nested_rows(value, self._indices)
        index = self._positions.to(value.device)
        if value.layout is torch.sparse_coo:
            return value.index_select(0, index)
        if value.layout is not torch.strided:
            self._refuse(path, value, f"has layout {value.layout}: use to_dense() or to_sparse_coo()")
        return value[index]

    def _mapping(self, value: Any, path: str) -> Any:
        reduced = {key: self.take(item, f"{path}[{key!r}]") for key, item in value.items()}
        if type(value) is dict:
            return reduced
        try:
            if not isinstance(value, MutableMapping):
                return type(value)(reduced)  # immutable mappings are made of others
            like = copy.copy(value)
            for key, item in reduced.items():
                like[key] = item
        except Exception as error:  # noqa: BLE001 - whatever the type's own methods raise
            self._refuse(path, value, f"cannot be made of reduced columns ({error})")
        # A tokenizer's output keeps one `Encoding` per row beside its columns.
        lists = {name: item for name, item in getattr(value, "__dict__", {}).items() if isinstance(item, list)}
        return self._with_attributes(like, lists, path) if lists else like

    def _sequence(self, value: Any, path: str) -> Any:
        if hasattr(value, "_fields"):  # a named tuple
            pairs = zip(value._fields, value, strict=True)
            return type(value)._make([self.take(item, f"{path}.{name}") for name, item in pairs])
        if self._is_column(value, path):
            self.found = True
            return self._rebuilt(value, [value[index] for index in self._indices], path)
        items = [self.take(item, f"{path}[{index}]") for index, item in enumerate(value)]
        unchanged = all(new is old for new, old in zip(items, value, strict=True))
        return value if unchanged else self._rebuilt(value, items, path)

    def _is_column(self, value: Sequence[Any], path: str) -> bool:
        """Return whether the entries are rows; False if they are columns, or of no concern."""
        length = len(value)
        with_rows = [] if set(map(type, value)) <= _PLAIN else [item for item in value if self._has_rows(item)]
        if not with_rows:
            self._require_no_multiple(value, length, path)
            return length == self._rows
        some = len(with_rows) < sum(item is not None for item in value)
        if not _are_alike(value):
            if length == self._rows and some:
                self._refuse(path, value, f"has {length} entries, of which some hold {self._rows} rows: {_EITHER_WAY}")
            return False
        if some:
            if length == self._rows:
                return True  # rows of different lengths, one of which happens to be as long as the batch
            self._require_no_multiple(value, length, path)
            self._refuse(path, value, f"has {length} entries, of which some hold {self._rows} rows: {_EITHER_WAY}")
        if length == self._rows or self._is_multiple(length):
            self._refuse(path, value, f"has {length} entries of {self._rows} rows each: {_EITHER_WAY}")
        return False

    def _with_attributes(self, value: Any, attributes: Mapping[str, Any], path: str) -> Any:
        like = copy.copy(value)
        for name, item in attributes.items():
            # Not dataclasses.replace(): it would run __post_init__ again and refuse fields that are not of __init__.
            object.__setattr__(like, name, self.take(item, f"{path}.{name}"))
        return like

    def _unknown(self, value: Any, path: str) -> Any:
        if isinstance(value, Iterator):
            self._refuse(path, value, "can be read only once: make it a list")
        for name, item in getattr(value, "__dict__", {}).items():
            if self._has_rows(item):
                self._refuse(path, value, f"holds {self._rows} rows in {name!r}: make it a dictionary or a dataclass")
        try:
            length = len(value)
        except TypeError:
            return value
        if length == self._rows:
            self._refuse(path, value, f"has {length} entries: make it a list, a tensor or a NumPy array")
        self._require_no_multiple(value, length, path)
        return value

    def _has_rows(self, value: Any) -> bool:
        """Return whether a value has rows, or holds something that has."""
        if isinstance(value, _LEAVES):
            return False
        if isinstance(value, torch.Tensor | np.ndarray):
            return _length(value) == self._rows
        if isinstance(value, Mapping):
            return any(map(self._has_rows, value.values()))
        if dataclasses.is_dataclass(value):
            return any(self._has_rows(getattr(value, field.name)) for field in dataclasses.fields(value))
        if not isinstance(value, Sequence):
            return False
        is_column = len(value) == self._rows and not hasattr(value, "_fields")
        return is_column or (not set(map(type, value)) <= _PLAIN and any(map(self._has_rows, value)))

    def _is_multiple(self, length: int) -> bool:
        return length > self._rows > 1 and length % self._rows == 0

    def _require_no_multiple(self, value: Any, length: int, path: str) -> None:
        if self._is_multiple(length):
            self._refuse(
                path,
                value,
                f"has {length} entries, {length // self._rows} for each of the super-batch's {self._rows} rows: "
                f"group them by row ([{self._rows}, {length // self._rows}, ...], or a list of lists)",
            )

    def _rebuilt(self, value: Any, items: list[Any], path: str) -> Any:
        if isinstance(value, deque):
            return deque(items, value.maxlen)
        try:
            return type(value)(items)
        except Exception as error:  # noqa: BLE001 - whatever the type's constructor raises
            self._refuse(path, value, f"cannot be made of a list of its entries ({error}): make it a list")

    def _refuse(self, path: str, value: object, problem: str) -> NoReturn:
        raise ValueError(
            f"{path} ({type(value).__name__}) {problem}; or reduce the batch yourself with "
            "take=lambda batch, positions: ..."
        )


_PLAIN = {int, float, bool, str, bytes, type(None)}
_EITHER_WAY = (
    "they may be rows or columns; make rows a tensor or a NumPy array (of dtype object, say), "
    "and columns a dictionary or a named tuple"
)


def _length(value: Any) -> int:
    """Return the first dimension of a tensor or an array, -1 of a scalar."""
    if value.ndim == 0:
        return -1
    # A nested tensor has a size but no shape.
    return int(value.size(0) if isinstance(value, torch.Tensor) else value.shape[0])


def _nested_rows(value: torch.Tensor, indices: list[int]) -> torch.Tensor:
    rows = value.unbind()
    if indices:
        return torch.nested.as_nested_tensor([rows[index] for index in indices], layout=value.layout)
    if value.layout is torch.jagged:
        offsets = torch.zeros(1, dtype=torch.int64, device=value.device)
        return torch.nested.nested_tensor_from_jagged(value.values()[:0], offsets=offsets)
    return torch.nested.nested_tensor([], dtype=value.dtype, device=value.device)


def _are_alike(values: Sequence[Any]) -> bool:
    """Return whether values may be rows of one column: none of them is clearly of another kind than the first."""
    kinds = dict.fromkeys(_kind(value) for value in values if value is not None)
    first, first_details = next(iter(kinds))
    return all(
        kind is first and (not details or not first_details or not details.isdisjoint(first_details))
        for kind, details in kinds
    )


def _kind(value: Any) -> tuple[type, frozenset[Any]]:
    """Return a value's type, and details of which two rows of one column share some."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return type(value), frozenset([(str(value.dtype), value.ndim)])
    if isinstance(value, Mapping):
        return type(value), frozenset((key, _plain_type(item)) for key, item in value.items())
    if dataclasses.is_dataclass(value):
        return type(value), frozenset((f.name, _plain_type(getattr(value, f.name))) for f in dataclasses.fields(value))
    if isinstance(value, Sequence) and not isinstance(value, _LEAVES):
        return type(value), frozenset(Number if issubclass(kind, Number) else kind for kind in set(map(type, value)))
    return _plain_type(value), frozenset()


def _plain_type(value: object) -> type:
    return Number if isinstance(value, Number) else type(value)
