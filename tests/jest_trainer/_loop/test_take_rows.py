from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest
import torch

from jest_trainer._loop.take_rows import take_rows

ROWS = 5
CHOSEN = torch.tensor([3, 0])


def taken(batch, rows=ROWS):
    return take_rows(batch, CHOSEN if rows == ROWS else torch.tensor([1]), rows)


def test_a_tensor_keeps_the_chosen_rows_in_order_of_choice():
    assert taken(torch.arange(10).reshape(5, 2)).tolist() == [[6, 7], [0, 1]]


def test_an_array_keeps_its_type():
    result = taken(np.arange(5, dtype=np.int16))
    assert (result.dtype, result.tolist()) == (np.int16, [3, 0])


def test_a_dictionary_is_reduced_value_by_value_and_left_as_it_was():
    batch = {"image": torch.arange(5), "caption": list("abcde"), "nested": {"ids": np.arange(5)}, "epoch": 4}
    result = taken(batch)
    assert result["image"].tolist() == [3, 0]
    assert result["caption"] == ["d", "a"]
    assert result["nested"]["ids"].tolist() == [3, 0]
    assert result["epoch"] == 4
    assert len(batch["caption"]) == len(batch["image"]) == 5


def test_what_has_no_rows_passes_through_untouched():
    scalar, other, name = torch.tensor(5), torch.arange(4), "12345"
    result = taken({"x": torch.arange(5), "scalar": scalar, "other": other, "name": name, "none": None, "type": dict})
    assert result["scalar"] is scalar
    assert result["other"] is other
    assert (result["name"], result["none"], result["type"]) == ("12345", None, dict)


@pytest.mark.parametrize("make", [list, tuple])
def test_a_sequence_of_tensors_is_reduced_item_by_item(make):
    result = taken(make([torch.arange(5), np.arange(5)]))
    assert type(result) is make
    assert [item.tolist() for item in result] == [[3, 0], [3, 0]]


@pytest.mark.parametrize("make", [list, tuple])
def test_a_sequence_as_long_as_the_batch_is_a_column(make):
    assert taken({"x": make("abcde")})["x"] == make("da")


def test_rows_of_different_lengths_are_a_column():
    ragged = [torch.zeros(length) for length in (5, 1, 2, 3, 5)]
    result = taken(ragged)
    assert result[0] is ragged[3]
    assert result[1] is ragged[0]


def test_records_are_a_column():
    records = [{"id": row} for row in range(5)]
    assert taken(records) == [{"id": 3}, {"id": 0}]


def test_a_pair_of_columns_of_a_super_batch_of_two_is_a_container():
    image, captions = torch.arange(2), ["a", "b"]
    result = taken((image, captions), rows=2)
    assert (result[0].tolist(), result[1]) == ([1], ["b"])


def test_two_views_of_a_super_batch_of_two_are_a_container():
    result = taken([{"image": torch.arange(2)}, {"image": torch.arange(2) + 10}], rows=2)
    assert [view["image"].tolist() for view in result] == [[1], [11]]


class Pair(NamedTuple):
    image: torch.Tensor
    text: list


def test_a_named_tuple_stays_one():
    result = taken(Pair(torch.arange(5), list("abcde")))
    assert type(result) is Pair
    assert (result.image.tolist(), result.text) == ([3, 0], ["d", "a"])


@dataclass(frozen=True, slots=True)
class Frozen:
    image: torch.Tensor
    scale: float
    cached: torch.Tensor = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "cached", self.image * 2)


def test_a_dataclass_stays_one_without_running_its_constructor_again():
    batch = Frozen(torch.arange(5), 2.0)
    result = taken(batch)
    assert type(result) is Frozen
    assert (result.image.tolist(), result.scale, result.cached.tolist()) == ([3, 0], 2.0, [6, 0])
    assert len(batch.image) == 5


@pytest.mark.parametrize(
    "batch",
    [
        OrderedDict(x=torch.arange(5)),
        UserDict(x=torch.arange(5)),
        defaultdict(list, x=torch.arange(5)),
    ],
)
def test_other_mappings_keep_their_type(batch):
    result = taken(batch)
    assert type(result) is type(batch)
    assert result["x"].tolist() == [3, 0]
    assert len(batch["x"]) == 5


def test_a_batch_without_rows_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"nothing in the batch \(dict\) has 5 rows .* take=lambda"):
        taken({"x": torch.arange(4), "name": "abcde"})


def test_no_chosen_rows_leave_an_empty_batch():
    result = take_rows({"x": torch.zeros(5, 2), "caption": list("abcde")}, torch.tensor([], dtype=torch.int64), 5)
    assert (tuple(result["x"].shape), result["caption"]) == ((0, 2), [])


def test_memory_of_the_super_batch_is_not_shared():
    batch = torch.zeros(5, 2)
    assert taken(batch).untyped_storage().data_ptr() != batch.untyped_storage().data_ptr()
