"""No more than so many rows of one group, alone and together with example keys, ranks and placement."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jest_core_oracle as oracle
from jest_core import ExampleLosses, SelectionPolicy, select_sub_batch
from jest_core.sampling import CandidatePool, Groups
from jest_core_samples import random_pair


@st.composite
def restricted_rows(draw: st.DrawFn) -> tuple[list[int], oracle.Rules]:
    """An order of some rows, and rules so tight that many a sub-batch cannot be filled."""
    size, world_size = draw(st.integers(1, 30)), draw(st.integers(1, 4))
    ranks = draw(st.permutations([row % world_size for row in range(size)])) if size >= world_size else [0] * size
    keys = draw(st.lists(st.integers(0, draw(st.integers(0, 2 * size))), min_size=size, max_size=size))
    labels = st.none() | st.sampled_from("abcd")
    groups = draw(st.lists(labels, min_size=size, max_size=size))
    return draw(st.permutations(range(size))), oracle.Rules(ranks, keys, groups, draw(st.integers(1, 4)))


@settings(max_examples=300)
@given(case=restricted_rows(), data=st.data())
def test_taking_all_at_once_equals_walking_row_by_row(case, data):
    order, rules = case
    world_size = max(rules.ranks) + 1
    quotas = data.draw(st.lists(st.integers(0, 5), min_size=world_size, max_size=world_size))
    codes = {label: code for code, label in enumerate("abcd")}
    groups = Groups(torch.tensor([codes.get(label, -1) for label in rules.groups]), rules.limit)
    pool = CandidatePool(torch.tensor(rules.keys), max(rules.keys) + 1, torch.tensor(rules.ranks), world_size, groups)
    expected = oracle.walk(order, quotas, rules)
    if expected is None:
        with pytest.raises(ValueError, match=r"rank \d has \d+ rows that keys and max_per_group allow"):
            pool.take(torch.tensor(order), quotas)
    else:
        assert pool.take(torch.tensor(order), quotas).tolist() == expected
        unlimited = [10**9] * world_size
        assert pool.rows().tolist() == rules.allowed(expected, [], unlimited)


@settings(max_examples=200)
@given(case=restricted_rows(), data=st.data(), placement=st.sampled_from(["per_rank", "global"]))
def test_a_whole_selection_equals_the_walk_chunk_after_chunk(case, data, placement):
    order, given_rules = case
    rules = given_rules
    if placement == "global":
        rules = oracle.Rules([0] * len(order), rules.keys, rules.groups, rules.limit)
    world_size = max(rules.ranks) + 1
    b = world_size * data.draw(st.integers(1, max(1, len(order) // world_size)))
    num_chunks = data.draw(st.integers(1, b))
    chosen: list[int] | None = []
    for start, stop in pairwise(oracle.boundaries(b, num_chunks)):
        taken = oracle.walk(order, rules.quotas(start, stop), rules, chosen)
        chosen = None if taken is None else chosen + taken
        if chosen is None:
            break
    losses = torch.empty(len(order))
    losses[torch.tensor(order)] = torch.arange(len(order), 0, -1.0)
    policy = SelectionPolicy(
        loss="per_example",
        scoring="hard_learner",
        sampler="top_k",
        sub_batch_size=b,
        num_chunks=num_chunks,
        placement=placement,
        max_per_group=rules.limit,
    )
    limits = {
        "example_keys": rules.keys,
        "rank_of_row": torch.tensor(given_rules.ranks),
        "group_labels": rules.groups,
    }
    if chosen is None:
        with pytest.raises(ValueError, match=r"distinct example keys|max_per_group"):
            select_sub_batch(ExampleLosses(losses), None, policy, seed=0, **limits)
    else:
        selection = select_sub_batch(ExampleLosses(losses), None, policy, seed=0, **limits)
        assert selection.positions.tolist() == chosen


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_group_gives_more_than_its_limit_over_all_chunks(loss, limit):
    labels = [f"concept {row % 7}" for row in range(70)]
    policy = SelectionPolicy(loss=loss, sub_batch_size=7 * limit, num_chunks=min(5, 7 * limit), max_per_group=limit)
    selection = select_sub_batch(*random_pair(70, seed=1), policy, seed=2, group_labels=labels)
    counts = Counter(labels[row] for row in selection.positions.tolist())
    assert counts == dict.fromkeys(labels, limit)


def test_rows_of_no_group_are_not_limited():
    labels = ["one"] * 10 + [None] * 20
    policy = SelectionPolicy(sub_batch_size=21, num_chunks=4, max_per_group=1)
    selection = select_sub_batch(*random_pair(30, seed=2), policy, seed=0, group_labels=labels)
    assert Counter(labels[row] for row in selection.positions.tolist()) == {"one": 1, None: 20}


def test_labels_that_are_all_none_limit_nothing():
    pair = random_pair(30, seed=3)
    limited = SelectionPolicy(sub_batch_size=20, num_chunks=4, max_per_group=1)
    unlimited = SelectionPolicy(sub_batch_size=20, num_chunks=4)
    selection = select_sub_batch(*pair, limited, seed=0, group_labels=[None] * 30)
    assert torch.equal(selection.positions, select_sub_batch(*pair, unlimited, seed=0).positions)


def test_labels_without_a_limit_change_nothing():
    pair = random_pair(30, seed=4)
    policy = SelectionPolicy(sub_batch_size=20, num_chunks=4)
    selection = select_sub_batch(*pair, policy, seed=0, group_labels=["one"] * 30)
    assert torch.equal(selection.positions, select_sub_batch(*pair, policy, seed=0).positions)


def test_a_limit_that_no_group_reaches_changes_nothing():
    pair = random_pair(30, seed=5)
    labels = [row % 3 for row in range(30)]
    limited = SelectionPolicy(sub_batch_size=20, num_chunks=4, max_per_group=10)
    unlimited = SelectionPolicy(sub_batch_size=20, num_chunks=4)
    selection = select_sub_batch(*pair, limited, seed=0, group_labels=labels)
    assert torch.equal(selection.positions, select_sub_batch(*pair, unlimited, seed=0).positions)


def test_labels_mean_the_same_as_text_and_as_numbers():
    numbers = torch.tensor([7, -3, 7, 10**12, 5, -3, 8, -1, 0, 5])
    policy = SelectionPolicy(sub_batch_size=7, num_chunks=2, max_per_group=1)
    pair = random_pair(10, seed=6)
    by_number = select_sub_batch(*pair, policy, seed=4, group_labels=numbers)
    by_text = select_sub_batch(*pair, policy, seed=4, group_labels=[str(number) for number in numbers.tolist()])
    assert torch.equal(by_number.positions, by_text.positions)
    assert len(set(numbers[by_number.positions].tolist())) == 7


def test_perplexity_does_not_count_rows_of_full_groups():
    policy = SelectionPolicy(scoring="uniform", sub_batch_size=2, num_chunks=2, max_per_group=1)
    labels = ["a", "a", "a", "b", "b", "b"]
    selection = select_sub_batch(None, None, policy, seed=0, group_labels=labels, super_batch_size=6)
    assert selection.perplexity == pytest.approx((6.0, 3.0))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "group_labels must be given, because max_per_group is 2"),
        (["a"] * 9, "group_labels has 9 labels for a super-batch of 10 rows"),
        ("abcdefghij", "group_labels must hold one label for each row, not be a single string"),
        ([["a"]] * 10, "group_labels must be hashable: unhashable type: 'list'"),
        (torch.zeros(9, dtype=torch.int64), r"group_labels must be int64 of shape \[10\], .* of shape \[9\]"),
        (torch.zeros(10), r"group_labels must be int64 of shape \[10\], not torch.float32"),
        (["a"] * 10, r"rank 0 has 2 rows within max_per_group \(2\) to choose from, but needs 4"),
        (["a"] * 9 + [None], r"rank 0 has 3 rows within max_per_group \(2\) to choose from, but needs 4"),
    ],
)
def test_labels_must_name_every_row_and_leave_enough_of_them(labels, message):
    policy = SelectionPolicy(sub_batch_size=4, num_chunks=2, max_per_group=2)
    with pytest.raises(ValueError, match=message):
        select_sub_batch(*random_pair(10, seed=7), policy, seed=0, group_labels=labels)


def test_labels_of_a_wrong_length_are_an_error_even_where_nothing_is_limited():
    policy = SelectionPolicy(sub_batch_size=4, num_chunks=2)
    with pytest.raises(ValueError, match="group_labels has 9 labels for a super-batch of 10 rows"):
        select_sub_batch(*random_pair(10, seed=7), policy, seed=0, group_labels=["a"] * 9)


def test_a_rank_whose_groups_another_rank_filled_is_named():
    # Each rank could fill its share by itself; together they would need the one group twice.
    policy = SelectionPolicy(scoring="uniform", sampler="top_k", sub_batch_size=2, num_chunks=2, max_per_group=1)
    ranks = torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="rank 1 has 0 rows that keys and max_per_group allow to choose from"):
        select_sub_batch(None, None, policy, seed=0, rank_of_row=ranks, group_labels=["a"] * 4, super_batch_size=4)
