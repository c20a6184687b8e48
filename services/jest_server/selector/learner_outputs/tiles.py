"""Whether tiles cover a matrix in the order that the contract fixes: band after band, each from left to right."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jest_wire.learner_outputs import Tile


class TilingError(ValueError):
    """The tiles do not cover the matrix in row-major order; `tile` is the number of the wrong one, None for a gap."""

    def __init__(self, message: str, tile: int | None = None) -> None:
        super().__init__(message)
        self.tile = tile


def check_tiling(tiles: Sequence[Tile], rows: int, columns: int) -> None:
    """Refuse tiles that do not cover `[rows, columns]` exactly once, in row-major order.

    Raises:
        TilingError: A tile lies partly outside, is not the next in order or not as high as its band; or one is missing.
    """
    row = column = band = 0
    for number, tile in enumerate(tiles):
        if tile.row + tile.rows > rows or tile.column + tile.columns > columns:
            raise TilingError(f"covers {tile}, expected it inside [{rows}, {columns}]", number)
        if (tile.row, tile.column) != (row, column):
            raise TilingError(
                f"covers {tile}, expected it to start at row {row}, column {column}: tiles come in row-major order",
                number,
            )
        if column == 0:
            band = tile.rows
        elif tile.rows != band:
            raise TilingError(f"covers {tile}, expected {band} rows, as many as the tile to its left has", number)
        column += tile.columns
        if column == columns:
            row, column = row + band, 0
    if row < rows:
        covered = sum(tile.rows * tile.columns for tile in tiles)
        raise TilingError(
            f"cover {covered} elements, expected {rows * columns}: every element of [{rows}, {columns}], once"
        )
