"""Taking rows of any batch is indexing each of its leaves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from jest_trainer._loop.take_rows import take_rows


class Pair(NamedTuple):
    image: Any
    text: Any


@dataclass
class Columns:
    first: Any
    second: Any


def leaves(rows):
    """Pairs of a value and what is left of it."""

    def token_lists(draw_lengths):
        return lambda indices: [[index] * draw_lengths[index] for index in indices]

    lengths = st.lists(st.integers(0, 6), min_size=rows, max_size=rows)
    makers = st.one_of(
        st.just(lambda indices: torch.tensor(indices, dtype=torch.int64)),
        st.just(lambda indices: torch.tensor(indices, dtype=torch.float32)[:, None].expand(-1, 3)),
        st.just(lambda indices: np.array(indices, np.int32)),
        st.just(lambda indices: np.array([str(index) for index in indices], object)),
        st.just(lambda indices: [f"caption {index}" for index in indices]),
        st.just(lambda indices: tuple(None if index % 2 else str(index) for index in indices)),
        st.just(lambda indices: deque([index] for index in indices)),
        st.just(lambda indices: [{"id": index, "pixels": torch.full((3, 2), index)} for index in indices]),
        lengths.map(token_lists),
    )
    return makers.map(lambda make: (make(range(rows)), make))


def constants():
    values = st.sampled_from([7, "name", None, 0.5, torch.tensor(3.0), torch.Size([1, 2])])
    return values.map(lambda value: (value, lambda _indices: value))


def containers(parts):
    def build(make):
        return lambda pair: (
            make([value for value, _ in pair]),
            lambda indices: make([left(indices) for _, left in pair]),
        )

    several = st.lists(parts, min_size=1, max_size=3)
    two = st.tuples(parts, parts)
    return st.one_of(
        several.map(build(lambda values: {f"column {index}": value for index, value in enumerate(values)})),
        two.map(build(lambda values: Pair(*values))),
        two.map(build(lambda values: Columns(*values))),
        several.map(build(list)),
        several.map(build(tuple)),
        several.map(build(deque)),
    )


@st.composite
def batches(draw):
    rows = draw(st.integers(4, 8))  # more than a container has columns
    value, left = draw(containers(st.recursive(leaves(rows) | constants(), containers, max_leaves=5)))
    positions = draw(st.lists(st.integers(0, rows - 1), unique=True))
    return rows, value, positions, left


def same(left, right):
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.equal(right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, Columns):
        return same(vars(left), vars(right))
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, list | tuple | deque):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


@given(batches())
def test_taking_rows_of_any_batch_is_indexing_each_leaf_or_refused(batch):
    rows, value, positions, left = batch
    try:
        result = take_rows(value, torch.tensor(positions, dtype=torch.int64), rows)
    except ValueError as refused:
        assert "take=lambda batch, positions" in str(refused)  # noqa: PT017 - both outcomes are right
        return
    assert same(result, left(positions))


@given(
    st.integers(4, 8).flatmap(
        lambda rows: st.tuples(
            st.just(rows),
            st.dictionaries(st.text(max_size=3), leaves(rows) | constants(), min_size=1),
            st.lists(st.integers(0, rows - 1), unique=True),
        )
    )
)
def test_named_columns_are_never_refused_if_one_of_them_has_rows(batch):
    rows, columns, positions = batch
    value = {name: column for name, (column, _) in columns.items()} | {"row": torch.arange(rows)}
    try:
        result = take_rows(value, torch.tensor(positions, dtype=torch.int64), rows)
    except ValueError as refused:
        assert f"entries of {rows} rows each" in str(refused)  # noqa: PT017 - token lists of the batch's length
        return
    assert same(
        result,
        {name: left(positions) for name, (_, left) in columns.items()}
        | {"row": torch.tensor(positions, dtype=torch.int64)},
    )
