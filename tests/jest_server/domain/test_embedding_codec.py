import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jest_server.domain.embedding_codec import CODECS, Float16Codec, Int8Codec

WIDTH = 5
embeddings = st.integers(0, 9).flatmap(
    lambda n: arrays(np.float16, (n, 2, WIDTH), elements=st.floats(-60000, 60000, width=16))
)


def round_trip(codec, rows):
    values = codec.encode([row.tobytes() for row in rows], WIDTH)
    assert [len(value) for value in values] == [codec.value_bytes(WIDTH)] * len(rows)
    return np.frombuffer(b"".join(codec.decode(values, WIDTH)), np.float16).reshape(-1, 2, WIDTH)


@given(rows=embeddings)
def test_f16_comes_back_as_it_was(rows):
    np.testing.assert_array_equal(round_trip(Float16Codec(), rows), rows)


@given(rows=embeddings)
def test_int8_is_off_by_at_most_half_a_step_of_its_row(rows):
    """The oracle rounds each number by itself, in float64."""
    got = round_trip(Int8Codec(), rows)
    for example, decoded in zip(rows.astype(np.float64), got.astype(np.float64), strict=True):
        for row, numbers in zip(example, decoded, strict=True):
            step = max(abs(number) for number in row) / 127
            for number, close in zip(row, numbers, strict=True):
                # Half a step of int8, then half a step of f16 (relative, or absolute among the smallest numbers).
                assert abs(number - close) <= 0.5 * step * (1 + 1e-5) + abs(close) * 2**-11 + 2**-25


def test_rows_of_one_example_have_scales_of_their_own():
    rows = np.array([[[1000, -500, 250, 0, 1], [0.001, -0.0005, 0.00025, 0, 0]]], np.float16)
    got = round_trip(Int8Codec(), rows)
    np.testing.assert_allclose(got[0, 1], rows[0, 1], atol=0.001 / 254 + 1e-6)


def test_a_row_of_zeros_stays_one():
    assert not round_trip(Int8Codec(), np.zeros((1, 2, WIDTH), np.float16)).any()


def test_the_largest_number_of_a_row_comes_back_as_it_was():
    rows = np.array([[[3, -1, 0, 2, 1], [-7, 1, 2, 3, 4]]], np.float16)
    got = round_trip(Int8Codec(), rows)
    assert (got[0, 0, 0], got[0, 1, 0]) == (3, -7)


def test_int8_takes_half_the_space():
    assert CODECS["int8"].value_bytes(768) / CODECS["float16"].value_bytes(768) == pytest.approx(0.5, abs=0.003)
