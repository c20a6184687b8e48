import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jest_server.selector.learner_outputs.tiles import Tile, TilingError, check_tiling


def counted(tiles, rows, columns):
    """How often each element is covered, by painting: the slow oracle."""
    counts = np.zeros((rows, columns), int)
    for row, column, height, width in tiles:
        counts[row : row + height, column : column + width] += 1
    return counts


@st.composite
def tilings(draw, rows=6, columns=7):
    """Cuts a matrix in two again and again."""

    def cut(tile):
        row, column, height, width = tile
        if height > 1 and draw(st.booleans()):
            at = draw(st.integers(1, height - 1))
            return cut(Tile(row, column, at, width)) + cut(Tile(row + at, column, height - at, width))
        if width > 1 and draw(st.booleans()):
            at = draw(st.integers(1, width - 1))
            return cut(Tile(row, column, height, at)) + cut(Tile(row, column + at, height, width - at))
        return [tile]

    return draw(st.permutations(cut(Tile(0, 0, rows, columns))))


@given(tilings())
def test_a_matrix_that_is_cut_in_any_way_and_order_is_covered(tiles):
    check_tiling(tiles, 6, 7)


tiles_inside = st.builds(Tile, st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))


@given(st.lists(tiles_inside, max_size=6))
def test_tiles_pass_exactly_if_they_cover_every_element_once(tiles):
    inside = all(tile.row + tile.rows <= 4 and tile.column + tile.columns <= 4 for tile in tiles)
    if inside and (counted(tiles, 4, 4) == 1).all():
        check_tiling(tiles, 4, 4)
    else:
        with pytest.raises(TilingError):
            check_tiling(tiles, 4, 4)


@pytest.mark.parametrize(
    ("tiles", "at_fault", "says"),
    [
        ([Tile(0, 0, 4, 3)], None, "cover 12 elements, expected 16"),
        ([], None, "cover 0 elements, expected 16"),
        ([Tile(0, 0, 2, 4), Tile(1, 0, 3, 4)], 1, "which overlaps tile 0: rows 0 to 1, columns 0 to 3"),
        ([Tile(0, 0, 4, 4), Tile(0, 0, 4, 4)], 1, "which overlaps tile 0"),
        ([Tile(0, 0, 4, 2), Tile(0, 2, 4, 3)], 1, r"columns 2 to 4, expected it inside \[4, 4\]"),
        ([Tile(4, 0, 1, 4)], 0, r"rows 4 to 4.*expected it inside \[4, 4\]"),
    ],
)
def test_a_gap_an_overlap_and_a_tile_outside_are_named(tiles, at_fault, says):
    with pytest.raises(TilingError, match=says) as caught:
        check_tiling(tiles, 4, 4)
    assert caught.value.tile == at_fault


def test_many_tiles_are_checked_in_little_time():
    check_tiling([Tile(row, column, 1, 1) for row in range(200) for column in range(200)], 200, 200)
