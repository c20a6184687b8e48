from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jest_trainer._rpc.features import parts


@given(rows=st.lists(st.integers(0, 19), min_size=1, unique=True).map(sorted), part_bytes=st.integers(1, 500))
def test_the_parts_together_are_the_chosen_rows_in_order(rows, part_bytes):
    features = {"a": torch.arange(60).reshape(20, 3), "b": np.arange(20, dtype=np.uint8)}
    cut = list(parts(features, rows, part_bytes=part_bytes))
    assert [row for part, _ in cut for row in rows[part]] == rows
    assert torch.cat([tensors["a"] for _, tensors in cut]).equal(features["a"][rows])
    np.testing.assert_array_equal(np.concatenate([tensors["b"] for _, tensors in cut]), features["b"][rows])


@pytest.mark.parametrize(("part_bytes", "sizes"), [(1, [1] * 5), (8, [1] * 5), (16, [2, 2, 1]), (1000, [5])])
def test_a_part_holds_as_many_rows_as_fit_and_at_least_one(part_bytes, sizes):
    features = {"a": np.zeros((10, 2), np.float32)}
    assert [len(t["a"]) for _, t in parts(features, range(5), part_bytes=part_bytes)] == sizes


def test_rows_that_follow_each_other_are_not_copied():
    array = np.zeros((10, 2))
    ((_, tensors),) = parts({"a": array}, [3, 4, 5])
    assert np.shares_memory(tensors["a"], array)


def test_no_rows_make_no_parts():
    assert list(parts({"a": np.zeros((10, 2))}, [])) == []
