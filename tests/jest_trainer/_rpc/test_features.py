from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jest_trainer._rpc.features import check_features, check_reference_inputs, parts
from jest_trainer.results import ReferenceInput, ReferenceModel


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


REFERENCE = ReferenceModel(
    name="big",
    version="3",
    preprocessing_id="p",
    scale=10.0,
    bias=0.0,
    embedding_width=8,
    inputs=(ReferenceInput("image", "UINT8", (3, -1, -1)), ReferenceInput("mask", "BF16", (4,))),
)
FEATURES = {"image": np.zeros((2, 3, 5, 7), np.uint8), "mask": torch.zeros(2, 4, dtype=torch.bfloat16)}


def test_what_the_reference_model_takes_passes():
    check_reference_inputs(FEATURES, REFERENCE)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            {"image": FEATURES["image"], "masks": FEATURES["mask"]},
            r"features are \['image', 'masks'\], expected \['image', 'mask'\]: the inputs of .*'big' \(version 3",
        ),
        ({"image": FEATURES["image"]}, r"features are \['image'\], expected"),
        (FEATURES | {"ids": FEATURES["mask"]}, r"features are \['ids', 'image', 'mask'\], expected"),
        (FEATURES | {"image": np.zeros((2, 3, 5, 7))}, r"features\['image'\] has dtype float64, .* 'big' takes uint8"),
        (
            FEATURES | {"mask": torch.zeros(2, 4)},
            r"features\['mask'\] has dtype float32, .* takes bfloat16: convert it",
        ),
        (
            FEATURES | {"mask": torch.zeros(2, 5).bfloat16()},
            r"features\['mask'\] has shape \[5\] per row, .* takes \[4\]",
        ),
        (FEATURES | {"image": np.zeros((2, 5, 7), np.uint8)}, r"has shape \[5, 7\] per row, .* takes \[3, -1, -1\]"),
    ],
)
def test_what_the_reference_model_does_not_take_is_named(features, message):
    with pytest.raises(ValueError, match=message):
        check_reference_inputs(features, REFERENCE)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_only_dense_tensors_are_features():
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    for tensor, layout in ((torch.eye(2).to_sparse(), "sparse_coo"), (nested, "nested")):
        with pytest.raises(ValueError, match=rf"features\['x'\] must be a dense tensor, not {layout}: pad it"):
            check_features({"x": tensor}, 2)
