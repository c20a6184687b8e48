from __future__ import annotations

from array import array
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils.rnn import pack_sequence

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


def test_a_string_as_long_as_the_batch_and_other_values_without_rows_pass_through():
    values = {
        "name": "abcde",
        "raw": b"abcde",
        "size": torch.Size([5, 3]),
        "number": np.float32(1),
        "dtype": torch.half,
    }
    result = taken(values | {"x": torch.arange(5)})
    assert {key: result[key] for key in values} == values


# Rows or columns?


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([[row] * 5 for row in range(5)], r"\(list\) has 5 entries of 5 rows each: they may be rows or columns"),
        (tuple(torch.arange(5) for _ in range(5)), r"\(tuple\) has 5 entries of 5 rows each"),
        ([{"tokens": list(range(5))} for _ in range(5)], r"\(list\) has 5 entries of 5 rows each"),
        ([[[0], [1, 2], [3], [4], [5]] for _ in range(5)], r"\(list\) has 5 entries of 5 rows each"),
        ([torch.arange(5), torch.arange(5), None, None, None], r"\(list\) has 5 entries of 5 rows each"),
        ([torch.arange(5), list("abcde"), 1, 2, 3], r"\(list\) has 5 entries, of which some hold 5 rows"),
        ([list("abcde"), list("ab")], r"\(list\) has 2 entries, of which some hold 5 rows"),
        (
            ["a"] * 25,
            r"\(list\) has 25 entries, 5 for each of the super-batch's 5 rows: group them by row \(\[5, 5, ...\]",
        ),
        ([[1, 2]] * 10, r"\(list\) has 10 entries, 2 for each"),
        ([list(range(length)) for length in range(10)], r"\(list\) has 10 entries, 2 for each"),
        ([[0] * 5] * 10, r"\(list\) has 10 entries of 5 rows each"),
        (torch.zeros(25, 77), r"\(Tensor\) has 25 entries, 5 for each"),
        (np.zeros((10, 3)), r"\(ndarray\) has 10 entries, 2 for each"),
        ({1, 2, 3, 4, 5}, r"\(set\) has 5 entries: make it a list"),
        (array("i", range(5)), r"\(array\) cannot be made of a list of its entries .*: make it a list"),
        (dict.fromkeys("abcde").keys(), r"\(dict_keys\) has 5 entries: make it a list"),
        (iter(range(5)), r"\(range_iterator\) can be read only once: make it a list"),
        (range(5), r"\(range\) cannot be made of a list of its entries .*: make it a list"),
        (SimpleNamespace(ids=torch.arange(5)), r"\(SimpleNamespace\) holds 5 rows in 'ids': make it a dictionary"),
        (pack_sequence([torch.zeros(2)] * 5), r"\(PackedSequence\) is packed by time step"),
    ],
)
def test_what_can_be_read_in_two_ways_or_not_be_reduced_is_refused_by_name(value, problem):
    with pytest.raises(ValueError, match=rf"^batch\['side'\]\['x'\] {problem}.* take=lambda batch, positions"):
        taken({"image": torch.arange(5), "side": {"x": value}})


def test_the_name_of_a_column_leads_through_every_kind_of_container():
    with pytest.raises(ValueError, match=r"^batch\.text\[1\]\.image \(list\) has 10 entries"):
        taken(Pair(torch.arange(5), (torch.zeros(3), Pair(list("abcdefghij"), []))))


def test_64_lists_of_64_tokens_are_a_column_as_an_array_of_objects():
    tokens = np.empty(64, object)
    tokens[:] = [[row] * 64 for row in range(64)]
    assert list(take_rows({"tokens": tokens}, torch.tensor([9, 3]), 64)["tokens"]) == [[9] * 64, [3] * 64]


def test_columns_of_different_kinds_are_columns_even_if_they_are_as_many_as_the_rows():
    image, labels = torch.zeros(3, 3, 4, 4), torch.arange(3)
    result = take_rows((image, ["a", "b", "c"], labels), torch.tensor([2]), 3)
    assert (result[0].shape, result[1], result[2].tolist()) == ((1, 3, 4, 4), ["c"], [2])


def test_two_views_of_a_super_batch_of_two_may_as_well_be_two_records():
    views = [{"image": torch.arange(2)}, {"image": torch.arange(2) + 10}]
    with pytest.raises(
        ValueError, match=r"batch \(list\) has 2 entries of 2 rows each: .* a dictionary or a named tuple"
    ):
        taken(views, rows=2)
    assert [view["image"].tolist() for view in taken(Pair(*views), rows=2)] == [[1], [11]]


def test_captions_grouped_by_image_are_a_column():
    captions = [[f"{row}-{number}" for number in range(3)] for row in range(5)]
    assert taken({"captions": captions})["captions"] == [captions[3], captions[0]]


# Types


@pytest.mark.parametrize("make", [UserList, deque, lambda entries: deque(entries, 9)])
def test_other_sequences_keep_their_type(make):
    result = taken({"x": make("abcde")})["x"]
    assert type(result) is type(make([]))
    assert list(result) == ["d", "a"]
    assert getattr(result, "maxlen", None) == getattr(make([]), "maxlen", None)


def test_an_array_of_objects_is_a_column():
    objects = np.array([{"a": 1}, "b", None, [3], 4], object)
    assert taken({"x": objects})["x"].tolist() == [[3], {"a": 1}]


def test_an_array_of_strings_is_a_column():
    assert taken(np.array(["a", "b", "c", "dd", "e"])).tolist() == ["dd", "a"]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_reduced_row_by_row(layout):
    rows = [torch.arange(float(length)) for length in (1, 4, 2, 3, 5)]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    result = taken({"x": nested})["x"]
    assert (result.is_nested, result.layout) == (True, layout)
    assert [row.tolist() for row in result.unbind()] == [[0, 1, 2], [0]]
    none = take_rows({"x": nested}, torch.tensor([], dtype=torch.int64), 5)["x"]
    assert none.size(0) == 0


def test_sparse_tensors_are_reduced_and_stay_sparse():
    result = taken({"x": torch.eye(5).to_sparse()})["x"]
    assert result.layout is torch.sparse_coo
    assert result.to_dense().equal(torch.eye(5)[CHOSEN])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_tensors_that_cannot_be_indexed_are_refused():
    with pytest.raises(ValueError, match=r"batch\['x'\] \(Tensor\) has layout torch.sparse_csr: use to_dense\(\)"):
        taken({"x": torch.eye(5).to_sparse_csr()})


@pytest.fixture
def one_rank():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_distributed_tensors_are_refused_because_only_their_owner_knows_whose_rows_they_hold():
    value = distribute_tensor(torch.arange(5), init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"batch\['x'\] \(DTensor\) is distributed: put batch\['x'\].to_local\(\) or "):
        taken({"x": value})


class Tokens(UserDict):
    """As a tokenizer returns them: columns, and a list of one encoding per row beside them."""

    def __init__(self, data, encodings):
        super().__init__(data)
        self._encodings = encodings

    def encoded(self, row):
        return self._encodings[row]


def test_lists_beside_the_columns_of_a_mapping_are_reduced_with_them():
    batch = Tokens({"input_ids": torch.arange(10).reshape(5, 2)}, list("abcde"))
    result = taken(batch)
    assert type(result) is Tokens
    assert (result["input_ids"].tolist(), result.encoded(0), result.encoded(1)) == ([[6, 7], [0, 1]], "d", "a")
    assert (len(batch["input_ids"]), batch.encoded(0)) == (5, "a")


def test_more_encodings_than_rows_are_refused_by_name():
    with pytest.raises(ValueError, match=r"batch\._encodings \(list\) has 10 entries, 2 for each"):
        taken(Tokens({"input_ids": torch.zeros(5, 2)}, list("abcdefghij")))


def test_an_immutable_mapping_is_made_anew():
    result = taken(MappingProxyType({"x": torch.arange(5)}))
    assert (type(result), result["x"].tolist()) == (MappingProxyType, [3, 0])


class Fixed(UserDict):
    """Refuses columns of another length, as a TensorDict does."""

    def __setitem__(self, key, item):
        if len(item) != ROWS:
            raise RuntimeError("batch dimension mismatch")
        super().__setitem__(key, item)


def test_a_mapping_that_refuses_its_reduced_columns_is_named():
    with pytest.raises(ValueError, match=r"batch\['x'\] \(Fixed\) cannot be made of .*batch dimension mismatch.*take="):
        taken({"x": Fixed(y=torch.arange(5))})
