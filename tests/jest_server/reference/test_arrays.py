from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies
from hypothesis.extra.numpy import arrays

from jest_server.domain.embedding_codec import CODECS, encoded
from jest_server.domain.errors import ReferenceModelError
from jest_server.reference.arrays import check_norms, checked_embedding, count_examples, neutral_example
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
        (np.array([[1, 1, 1], [1, -65520, 1]], np.float32), "has values beyond float16 in 1 of 2 rows, first in row 1"),
    ],
)
def test_a_wrong_output_is_told_and_may_be_put_right(array, problem):
    with pytest.raises(ReferenceModelError, match=f"^model m: output text_embedding {problem}") as caught:
        checked_embedding(INFO, "text_embedding", array, examples=2)
    assert caught.value.retryable


def test_the_largest_float16_is_passed_on():
    array = np.array([[65504, 65519, -65519]], np.float32)
    assert checked_embedding(INFO, "image_embedding", array, examples=1) is array


def rows_of_norm(*norms):
    """Return examples whose images have these norms and whose texts have norm 1."""
    rows = np.zeros((len(norms), 2, INFO.embedding_width), np.float32)
    rows[:, 0, 0], rows[:, 1, 1] = norms, 1
    return rows


@pytest.mark.parametrize("norm", [0.0101, 1.0, 100.0, 1000.0])
def test_norms_of_embeddings_are_passed_on(norm):
    check_norms(INFO, rows_of_norm(1, norm))


@pytest.mark.parametrize("norm", [0.0, 1e-9, 0.0099, 1001.0, 6e4])
def test_norms_that_no_embedding_has_are_named_with_their_output_and_may_be_put_right(norm):
    problem = "output image_embedding has norms outside 0.01 to 1000 in 1 of 3 rows, first in row 2"
    with pytest.raises(ReferenceModelError, match=f"^model m: {problem}$") as caught:
        check_norms(INFO, rows_of_norm(1, 1, norm))
    assert caught.value.retryable
    with pytest.raises(ReferenceModelError, match="output text_embedding has norms"):
        check_norms(INFO, rows_of_norm(1, 1, norm)[:, ::-1])


@given(
    rows=arrays(np.float32, (4, 3), elements=strategies.floats(width=32, allow_nan=True, allow_infinity=True)),
    factor=strategies.sampled_from([1.0, 1e-3, 1e-6]),
)
def test_what_passes_is_finite_and_has_a_direction_however_the_cache_rounds(rows, factor):
    with np.errstate(all="ignore"):
        embeddings = (rows * np.float32(factor)).reshape(4, 1, 3).repeat(2, axis=1)
    try:
        for column in range(2):
            checked_embedding(INFO, "image_embedding", embeddings[:, column], examples=4)
        check_norms(INFO, embeddings)
    except ReferenceModelError:
        return
    values = {str(i): row.tobytes() for i, row in enumerate(embeddings.astype(np.float16))}
    for codec in CODECS.values():
        kept = codec.decode(list(encoded(codec, values, INFO).values()), INFO.embedding_width)
        norms = np.linalg.norm(np.frombuffer(b"".join(kept), np.float16).reshape(4, 2, 3).astype(np.float32), axis=2)
        assert (norms > 0.009).all()
        assert (norms < 1010).all()
