"""Whether tiles cover a matrix: each of its elements once, none twice, nothing outside.

A plane sweep from the first row down, in O(n log n) comparisons for n tiles.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tile(NamedTuple):
    """A rectangle of a matrix: where it starts and how large it is."""

    row: int
    column: int
    rows: int
    columns: int

    def __str__(self) -> str:
        return (
            f"rows {self.row} to {self.row + self.rows - 1}, columns {self.column} to {self.column + self.columns - 1}"
        )


class TilingError(ValueError):
    """The tiles do not cover the matrix exactly; ``tile`` is the number of the one at fault, None for a gap."""

    def __init__(self, message: str, tile: int | None = None) -> None:
        super().__init__(message)
        self.tile = tile


def check_tiling(tiles: Sequence[Tile], rows: int, columns: int) -> None:
    """Refuses tiles that do not cover ``[rows, columns]`` exactly once.

    Raises:
        TilingError: If a tile lies partly outside, two overlap, or a gap is left.
    """
    for number, tile in enumerate(tiles):
        if tile.row + tile.rows > rows or tile.column + tile.columns > columns:
            raise TilingError(f"covers {tile}, expected it inside [{rows}, {columns}]", number)
    _check_overlaps(tiles)
    covered = sum(tile.rows * tile.columns for tile in tiles)
    if covered < rows * columns:
        raise TilingError(
            f"cover {covered} elements, expected {rows * columns}: every element of [{rows}, {columns}], once"
        )


def _check_overlaps(tiles: Sequence[Tile]) -> None:
    order = sorted(range(len(tiles)), key=lambda number: tiles[number])
    columns: list[int] = []  # where the tiles on the current row start, ascending
    numbers: list[int] = []  # which tiles these are
    ends: list[tuple[int, int]] = []  # the row after a tile's last, and its first column
    for number in order:
        tile = tiles[number]
        while ends and ends[0][0] <= tile.row:
            at = bisect_left(columns, heapq.heappop(ends)[1])
            del columns[at], numbers[at]
        at = bisect_left(columns, tile.column)
        for neighbour in (at - 1, at):
            if 0 <= neighbour < len(numbers) and _share_columns(tile, tiles[numbers[neighbour]]):
                first, second = sorted((number, numbers[neighbour]))
                raise TilingError(f"covers {tiles[second]}, which overlaps tile {first}: {tiles[first]}", second)
        columns.insert(at, tile.column)
        numbers.insert(at, number)
        heapq.heappush(ends, (tile.row + tile.rows, tile.column))


def _share_columns(one: Tile, other: Tile) -> bool:
    return one.column < other.column + other.columns and other.column < one.column + one.columns
