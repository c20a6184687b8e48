"""Tiles are a matter of speed: however small they are, and wherever their edges lie, the answer is the same."""

import pytest
import torch

from jest_core import Embeddings, Selection, SelectionPolicy, select_sub_batch
from jest_core.tiles import chosen_tiles, row_tiles
from jest_core_samples import random_embeddings, random_pair, random_pair_losses

PAIR = random_pair(53, seed=1)
MATRICES = random_pair_losses(53, seed=2), random_pair_losses(53, seed=3)
TILES = [(1, 1), (1, 64), (64, 1), (7, 3), (52, 5), (53, 6), (54, 7)]


def selected(loss: str, kept: int, **fields: object) -> Selection:
    policy = SelectionPolicy(loss=loss, sub_batch_size=kept, num_chunks=3, weights=True, **fields)
    return select_sub_batch(*(MATRICES if loss == "pairwise" else PAIR), policy, seed=4)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax", "pairwise"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", [3, 17, 53])
@pytest.mark.parametrize("tile", TILES)
def test_a_selection_does_not_depend_on_its_tiles(monkeypatch, loss, precision, kept, tile):
    whole = selected(loss, kept, precision=precision)
    monkeypatch.setattr("jest_core.tiles.TILE_ROWS", tile[0])
    monkeypatch.setattr("jest_core.tiles.TILE_COLUMNS", tile[1])
    tiled = selected(loss, kept, precision=precision)
    assert torch.equal(tiled.positions, whole.positions)
    assert tiled.perplexity == pytest.approx(whole.perplexity, rel=1e-4)
    torch.testing.assert_close(tiled.weights, whole.weights, rtol=1e-3, atol=1e-3)


def test_a_selection_of_many_real_tiles_equals_one_of_small_tiles(monkeypatch):
    # 2,500 rows fill several tiles and end in a short one; the weights of 2,300 need more than one tile of chosen rows.
    assert len(list(row_tiles(torch.arange(2500), 2500))) > 2
    assert len(list(chosen_tiles(torch.arange(2300)))) > 1
    learner, reference = (random_embeddings(2500, seed=seed, width=6) for seed in (5, 6))
    policy = SelectionPolicy(sub_batch_size=2300, num_chunks=2, sampler="top_k", weights=True)
    large = select_sub_batch(learner, reference, policy, seed=0)
    monkeypatch.setattr("jest_core.tiles.TILE_ROWS", 2500)
    monkeypatch.setattr("jest_core.tiles.TILE_COLUMNS", 400)
    small = select_sub_batch(learner, reference, policy, seed=0)
    assert set(small.positions.tolist()) == set(large.positions.tolist())
    assert small.perplexity == pytest.approx(large.perplexity, rel=1e-4)
    by_row = [dict(zip(one.positions.tolist(), one.weights.tolist(), strict=True)) for one in (small, large)]
    assert by_row[0] == pytest.approx(by_row[1], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("tile", [1, 4, 10, 11])
@pytest.mark.parametrize("wanted", [[], [3], [0, 9], list(range(10)), list(range(1, 10))])
def test_tiles_cover_the_wanted_rows_once(monkeypatch, tile, wanted):
    monkeypatch.setattr("jest_core.tiles.TILE_ROWS", tile)
    covered = [row for rows in row_tiles(torch.tensor(wanted, dtype=torch.int64), 10) for row in torch.arange(10)[rows]]
    assert len(covered) == len(set(map(int, covered)))
    assert set(wanted) <= set(map(int, covered))


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_width_of_the_learner_is_none_of_the_references_business(loss, width):
    learner, reference = random_embeddings(20, seed=7, width=width), random_embeddings(20, seed=8, width=9)
    padded = [torch.nn.functional.pad(matrix, (0, 9 - width)) for matrix in (learner.image, learner.text)]
    policy = SelectionPolicy(loss=loss, sub_batch_size=11, num_chunks=3)
    expected = select_sub_batch(learner, reference, policy, seed=0)
    selection = select_sub_batch(Embeddings(*padded, learner.scale, learner.bias), reference, policy, seed=0)
    assert torch.equal(selection.positions, expected.positions)
