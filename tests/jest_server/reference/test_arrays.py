from __future__ import annotations

import numpy as np
import pytest

from jest_server.domain.errors import ReferenceModelError
from jest_server.reference.arrays import checked_embedding, count_examples, neutral_example
from support.super_batches import reference_of_pictures

INFO = reference_of_pictures(side=2, name="m", embedding_width=3)


def inputs(**changes):
    return {"image": np.zeros((4, 3, 2, 2), np.uint8), "tokens": np.zeros((4, 7), np.int32), **changes}


def test_examples_of_the_right_kind_are_counted():
    assert count_examples(INFO, inputs()) == 4


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mask": np.zeros(4)}, r"inputs: \['image', 'mask', 'tokens'\], expected \['image', 'tokens'\]"),
        ({"tokens": np.zeros((4, 7), np.int64)}, "datatype of input tokens: int64, expected int32"),
        ({"image": np.zeros((4, 3, 2, 1), np.uint8)}, r"shape of input image: \[4, 3, 2, 1\], expected \[n, 3, 2, 2\]"),
        ({"image": np.zeros((4, 3, 2), np.uint8)}, r"shape of input image: \[4, 3, 2\], expected \[n, 3, 2, 2\]"),
        ({"tokens": np.zeros(4, np.int32)}, r"shape of input tokens: \[4\], expected \[n, -1\]"),
        ({"tokens": np.zeros((5, 7), np.int32)}, "examples of the inputs: {'image': 4, 'tokens': 5}"),
    ],
)
def test_examples_of_a_wrong_kind_are_refused_for_good(changes, problem):
    with pytest.raises(ReferenceModelError, match=f"^model m: {problem}") as caught:
        count_examples(INFO, inputs(**changes))
    assert not caught.value.retryable


def test_the_neutral_example_is_one_that_the_model_takes():
    example = neutral_example(INFO)
    assert count_examples(INFO, example) == 1
    assert example["tokens"].shape == (1, 1)


def test_a_right_output_is_passed_on():
    array = np.ones((2, 3), np.float32)
    assert checked_embedding(INFO, "image_embedding", array, examples=2) is array


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (None, "is missing"),
        (np.ones((2, 3)), r"is float64 \[2, 3\], expected float32 \[2, 3\]"),
        (np.ones((2, 4), np.float32), r"is float32 \[2, 4\], expected float32 \[2, 3\]"),
        (np.ones((3, 3), np.float32), r"is float32 \[3, 3\], expected float32 \[2, 3\]"),
        (np.array([[1, 1, 1], [1, np.nan, 1]], np.float32), "has NaN or infinity in 1 of 2 rows, first in row 1"),
        (np.array([[1, 1, -np.inf], [1, 1, 1]], np.float32), "has NaN or infinity in 1 of 2 rows, first in row 0"),
    ],
)
def test_a_wrong_output_is_told_and_may_be_put_right(array, problem):
    with pytest.raises(ReferenceModelError, match=f"^model m: output text_embedding {problem}") as caught:
        checked_embedding(INFO, "text_embedding", array, examples=2)
    assert caught.value.retryable
