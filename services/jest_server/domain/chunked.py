"""Long sequences, a batch at a time: Python 3.12 has this as ``itertools.chunked``."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")


def chunked(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Yields all items in order, ``size`` at a time; the last batch may be smaller."""
    rest = iter(items)
    while batch := tuple(islice(rest, size)):
        yield batch
