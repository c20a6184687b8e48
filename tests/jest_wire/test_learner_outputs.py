from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from jest_core import SelectionPolicy
from jest_core.policy import Loss
from jest_proto.v1 import selection_pb2
from jest_wire.learner_outputs import OUTPUT_KINDS, Kind, example_loss_names, tiles
from jest_wire.tensors import CHUNK_BYTES


def test_each_loss_has_a_kind_of_outputs_that_the_contract_knows():
    assert sorted(OUTPUT_KINDS) == sorted(get_args(Loss))
    outputs = selection_pb2.SelectSubBatchHeader.DESCRIPTOR.oneofs_by_name["outputs"]
    assert (
        sorted(get_args(Kind)) == sorted(field.name for field in outputs.fields) == sorted(set(OUTPUT_KINDS.values()))
    )


@pytest.mark.parametrize(
    ("scoring", "names"),
    [
        ("learnability", ["learner_loss", "reference_loss"]),
        ("hard_learner", ["learner_loss"]),
        ("easy_reference", ["reference_loss"]),
        ("uniform", []),
    ],
)
def test_the_scoring_says_whose_losses_of_single_examples_are_sent(scoring, names):
    assert example_loss_names(SelectionPolicy(scoring=scoring, loss="per_example", sub_batch_size=16)) == names


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (5, 7), (700, 1000), (3, CHUNK_BYTES // 4), (2, CHUNK_BYTES + 3), (1 << 20, 3)]
)
def test_tiles_cover_every_element_once_and_fit_one_chunk_each(rows, columns, itemsize):
    counts = np.zeros((rows, columns), np.uint8)
    for tile in tiles(rows, columns, itemsize):
        assert 0 < tile.rows * tile.columns * itemsize <= CHUNK_BYTES
        counts[tile.row : tile.row + tile.rows, tile.column : tile.column + tile.columns] += 1
    assert (counts == 1).all()


def test_tiles_come_in_row_major_order():
    cut = list(tiles(3, CHUNK_BYTES, 4))
    assert len(cut) == 12
    assert [(tile.row, tile.column) for tile in cut] == sorted((tile.row, tile.column) for tile in cut)


def test_tiles_are_whole_rows_where_a_row_fits():
    assert {(tile.column, tile.columns) for tile in tiles(5000, 1000, 4)} == {(0, 1000)}
    assert sum(1 for _ in tiles(5000, 1000, 4)) == 20  # 262 rows of 4,000 bytes in 1 MiB
