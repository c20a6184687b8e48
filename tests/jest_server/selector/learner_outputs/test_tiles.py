import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jest_server.selector.learner_outputs.tiles import TilingError, check_tiling
from jest_wire.learner_outputs import Tile


def counted(tiles, rows, columns):
    """How often each element is covered, by painting: the slow oracle."""
    counts = np.zeros((rows, columns), int)
    for row, column, height, width in tiles:
        counts[row : row + height, column : column + width] += 1
    return counts


def in_bands(tiles):
    """Whether tiles come band after band, the tiles of a band from left to right and all equally high."""
    order = [(tile.row, tile.column) for tile in tiles]
    return order == sorted(order) and len({(tile.row, tile.rows) for tile in tiles}) == len({row for row, _ in order})


@st.composite
def cuts(draw, size):
    """Cuts a length into pieces: (start, length) each."""
    inner = sorted(draw(st.sets(st.integers(1, size - 1))))
    return [(start, end - start) for start, end in zip([0, *inner], [*inner, size], strict=True)]


@st.composite
def tilings(draw, rows=6, columns=7):
    """Cuts a matrix into bands, and each band into tiles of its own widths."""
    return [
        Tile(row, column, height, width) for row, height in draw(cuts(rows)) for column, width in draw(cuts(columns))
    ]


@given(tilings())
def test_a_matrix_that_is_cut_into_any_bands_is_covered(tiles):
    check_tiling(tiles, 6, 7)


@given(tilings().flatmap(lambda tiles: st.tuples(st.just(tiles), st.permutations(tiles))))
def test_tiles_in_another_order_are_refused(pair):
    tiles, shuffled = pair
    if tiles == shuffled:
        return
    with pytest.raises(TilingError, match="row-major order"):
        check_tiling(shuffled, 6, 7)


tiles_inside = st.builds(Tile, st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))


@given(st.lists(tiles_inside, max_size=6))
def test_tiles_pass_exactly_if_they_cover_every_element_once_in_bands(tiles):
    inside = all(tile.row + tile.rows <= 4 and tile.column + tile.columns <= 4 for tile in tiles)
    if inside and in_bands(tiles) and (counted(tiles, 4, 4) == 1).all():
        check_tiling(tiles, 4, 4)
    else:
        with pytest.raises(TilingError):
            check_tiling(tiles, 4, 4)


@pytest.mark.parametrize(
    ("tiles", "at_fault", "says"),
    [
        ([Tile(0, 0, 4, 3)], None, "cover 12 elements, expected 16"),
        ([], None, "cover 0 elements, expected 16"),
        (
            [Tile(0, 0, 2, 4), Tile(1, 0, 3, 4)],
            1,
            "rows 1 to 3, columns 0 to 3, expected it to start at row 2",
        ),
        ([Tile(0, 0, 4, 4), Tile(0, 0, 4, 4)], 1, "expected it to start at row 4, column 0: tiles come in row-major"),
        (
            [Tile(2, 0, 2, 4), Tile(0, 0, 2, 4)],
            0,
            "rows 2 to 3, columns 0 to 3, expected it to start at row 0",
        ),
        ([Tile(0, 2, 4, 2), Tile(0, 0, 4, 2)], 0, "expected it to start at row 0, column 0"),
        ([Tile(0, 0, 4, 2), Tile(0, 2, 2, 2), Tile(2, 2, 2, 2)], 1, "expected 4 rows, as many as the tile to its left"),
        ([Tile(0, 0, 4, 2), Tile(0, 2, 4, 3)], 1, r"columns 2 to 4, expected it inside \[4, 4\]"),
        ([Tile(4, 0, 1, 4)], 0, r"rows 4 to 4.*expected it inside \[4, 4\]"),
    ],
)
def test_what_is_wrong_with_a_tile_is_named(tiles, at_fault, says):
    with pytest.raises(TilingError, match=says) as caught:
        check_tiling(tiles, 4, 4)
    assert caught.value.tile == at_fault


def test_many_tiles_are_checked_in_little_time():
    check_tiling([Tile(row, column, 1, 1) for row in range(200) for column in range(200)], 200, 200)
