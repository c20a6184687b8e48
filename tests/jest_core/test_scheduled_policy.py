"""Policies whose filter ratio or gain changes with the training step."""

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jest_core_oracle as oracle
from jest_core import Schedule, SelectionPolicy, conditional_logits, select_sub_batch
from jest_core_samples import random_pair

RISING = {"shape": "linear", "start": 0.5, "end": 0.8, "steps": 100, "warmup_steps": 20}
WARMED = {"shape": "cosine", "start": 2.0, "end": 0.5, "steps": 60, "warmup_steps": 10}


@given(
    step=st.integers(0, 200),
    world_size=st.integers(1, 16),
    size=st.integers(400, 4000),
    placement=st.sampled_from(["per_rank", "global"]),
)
def test_a_scheduled_ratio_becomes_a_sub_batch_size(step, world_size, size, placement):
    policy = SelectionPolicy(filter_ratio=Schedule(**RISING), num_chunks=8, placement=placement)
    ratio = Fraction(str(round(oracle.scheduled(step, **RISING), 9)))
    expected = math.floor(size * (1 - ratio))
    if placement == "per_rank":
        expected = expected // world_size * world_size
    at_step = policy.at_step(step, size, world_size)
    assert at_step == SelectionPolicy(sub_batch_size=expected, num_chunks=8, placement=placement)
    assert not at_step.is_scheduled


@given(step=st.integers(0, 100))
def test_a_scheduled_gain_becomes_a_number(step):
    policy = SelectionPolicy(filter_ratio=0.8, gain=Schedule(**WARMED))
    at_step = policy.at_step(step, 1000, world_size=3)
    assert at_step.gain == pytest.approx(oracle.scheduled(step, **WARMED), abs=1e-9)
    assert at_step == SelectionPolicy(filter_ratio=0.8, gain=at_step.gain)


def test_both_may_be_scheduled():
    policy = SelectionPolicy(filter_ratio=Schedule(**RISING), gain=Schedule(**WARMED))
    assert policy.at_step(10, 1000) == SelectionPolicy(sub_batch_size=750, gain=2.0)
    assert policy.at_step(10**6, 1000) == SelectionPolicy(sub_batch_size=200, gain=0.5)


@pytest.mark.parametrize("sizes", [{"filter_ratio": 0.8}, {"sub_batch_size": 50}])
@pytest.mark.parametrize("step", [0, 7, 10**9])
def test_a_policy_without_schedules_is_the_same_at_every_step(sizes, step):
    policy = SelectionPolicy(**sizes, scoring="hard_learner", weights=True)
    assert not policy.is_scheduled
    assert policy.at_step(step, 1000, world_size=7) == policy


def test_warming_up_begins_with_the_whole_super_batch_and_uniform_sampling():
    policy = SelectionPolicy(filter_ratio=Schedule(**RISING), gain=Schedule(**WARMED), num_chunks=4)
    assert policy.at_step(0, 40) == SelectionPolicy(sub_batch_size=40, gain=0.0, num_chunks=4)


def test_a_gain_of_zero_is_uniform_sampling():
    policy = SelectionPolicy(filter_ratio=0.5, gain=0.0, num_chunks=5)
    selection = select_sub_batch(*random_pair(20, seed=1), policy, seed=1)
    assert selection.perplexity == pytest.approx([20, 18, 16, 14, 12])
    uniform = SelectionPolicy(scoring="uniform", filter_ratio=0.5, num_chunks=5)
    expected = select_sub_batch(None, None, uniform, seed=1, super_batch_size=20)
    assert selection.positions.tolist() == expected.positions.tolist()


@pytest.mark.parametrize(
    ("fields", "super_batch_size", "world_size", "message"),
    [
        ({"num_chunks": 4}, 15, 1, r"num_chunks \(4\) is larger than the sub-batch \(3\)"),
        (
            {"num_chunks": 4},
            20,
            3,
            r"filter_ratio \(0.8 at step 500\) leaves 3 of .* 20 on 3 ranks, .* num_chunks \(4\)",
        ),
        ({"num_chunks": 1}, 20, 5, r"filter_ratio \(0.8 at step 500\) leaves 0 of a super-batch of 20 on 5 ranks"),
        ({"num_chunks": 1}, 4, 1, r"filter_ratio \(0.8\) leaves nothing of a super-batch of 4"),
        ({"num_chunks": 1}, 0, 1, r"super_batch_size \(0\) must be an integer of at least 1"),
        ({"num_chunks": 1}, 20, 0, r"world_size \(0\) must be an integer of at least 1"),
    ],
)
def test_a_step_that_leaves_too_little_is_an_error(fields, super_batch_size, world_size, message):
    policy = SelectionPolicy(filter_ratio=Schedule(**RISING), **fields)
    with pytest.raises(ValueError, match=message):
        policy.at_step(500, super_batch_size, world_size)


@pytest.mark.parametrize("sizes", [{"filter_ratio": 0.5}, {"filter_ratio": Schedule(**RISING)}, {"sub_batch_size": 50}])
@pytest.mark.parametrize("step", [-1, 0.5, True])
def test_a_step_that_is_no_step_is_an_error(sizes, step):
    with pytest.raises(ValueError, match=r"step \(.*\) must be an integer of at least 0"):
        SelectionPolicy(**sizes).at_step(step, 1000)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filter_ratio": Schedule(**{**RISING, "end": 1.0})}, r"filter_ratio \(from 0 to 1\) must lie in \[0, 1\)"),
        ({"filter_ratio": Schedule(start=-0.1)}, r"filter_ratio \(from -0.1 to -0.1\) must lie in \[0, 1\)"),
        (
            {"filter_ratio": 0.5, "gain": Schedule(**{**WARMED, "end": -1.0})},
            r"gain \(from -1 to 2\) must be at least 0",
        ),
        (
            {"filter_ratio": Schedule(**RISING), "sub_batch_size": 5},
            "exactly one of sub_batch_size .5. and filter_ratio",
        ),
    ],
)
def test_a_schedule_that_leaves_the_range_of_its_field_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        SelectionPolicy(**fields)


@pytest.mark.parametrize(
    ("field", "sizes"),
    [("filter_ratio", {}), ("gain", {"filter_ratio": 0.5}), ("gain", {"sub_batch_size": 10})],
)
def test_a_policy_with_a_schedule_selects_nothing_before_its_step_is_known(field, sizes):
    policy = SelectionPolicy(**sizes, **{field: Schedule(**RISING)}, num_chunks=2)
    pair = random_pair(20, seed=0)
    message = rf"{field} depends on the step: call policy.at_step\(step, super_batch_size\) first"
    with pytest.raises(ValueError, match=message):
        select_sub_batch(*pair, policy, seed=0)
    with pytest.raises(ValueError, match=message):
        conditional_logits(*pair, policy, [])
    assert len(select_sub_batch(*pair, policy.at_step(20, 20), seed=0).positions) == 10


def test_a_scheduled_ratio_has_no_sub_batch_size_of_its_own():
    with pytest.raises(ValueError, match="filter_ratio depends on the step"):
        SelectionPolicy(filter_ratio=Schedule(**RISING)).resolve_sub_batch_size(1000)


def test_a_policy_with_schedules_survives_json():
    policy = SelectionPolicy(filter_ratio=Schedule(**RISING), gain=Schedule(**WARMED), loss="softmax", max_per_group=3)
    values = json.loads(json.dumps(policy.to_dict()))
    assert values["filter_ratio"] == RISING
    assert SelectionPolicy.from_dict(values) == policy


def test_a_schedule_in_a_dictionary_is_checked():
    with pytest.raises(ValueError, match=r"unknown schedule fields: stop"):
        SelectionPolicy.from_dict({"filter_ratio": {"start": 0.5, "stop": 0.8}})
