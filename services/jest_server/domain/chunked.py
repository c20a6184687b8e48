"""Long sequences in chunks, as `itertools.batched` of Python 3.12 gives them."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")


def chunked(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Yield all items in order, `size` at a time; the last chunk may be smaller."""
    rest = iter(items)
    while chunk := tuple(islice(rest, size)):
        yield chunk
