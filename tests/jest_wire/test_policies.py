from __future__ import annotations

import dataclasses

import pytest

from jest_core import Schedule, SelectionPolicy
from jest_proto.v1 import jobs_pb2 as pb
from jest_wire.policies import policy_from_values, policy_from_wire, policy_to_wire, values_from_wire, values_to_wire
from jest_wire.values import FieldError

POLICIES = [
    {},
    {"scoring": "easy_reference", "loss": "softmax"},
    {"scoring": "hard_learner", "loss": "pairwise", "normalization": "mean"},
    {"scoring": "uniform", "loss": "per_example", "sampler": "top_k"},
    {"placement": "global", "precision": "bfloat16", "weights": True},
    {"max_per_group": 3, "num_chunks": 1},
    {"gain": 0},
    {"gain": 0.1},
    {"gain": Schedule(start=2.0, warmup_steps=10)},
    {"gain": Schedule(start=0.0, shape="linear", end=3.0, steps=100)},
    {"filter_ratio": 0},
    {"filter_ratio": 0.1 + 0.2},
    {"filter_ratio": Schedule(start=0.1, shape="cosine", end=0.9, steps=7, warmup_steps=3)},
    {"filter_ratio": None, "sub_batch_size": 32},
    {"filter_ratio": None, "sub_batch_size": 32, "gain": Schedule(start=1.5)},
]


@pytest.mark.parametrize("fields", POLICIES, ids=str)
def test_a_policy_comes_back_as_it_was_sent(fields):
    policy = SelectionPolicy(**{"filter_ratio": 0.8} | fields)
    wire = pb.SelectionPolicy.FromString(policy_to_wire(policy).SerializeToString())
    assert policy_from_wire(wire) == policy


def test_each_field_of_a_policy_changes_what_is_sent():
    base = SelectionPolicy(filter_ratio=0.8)
    others = {
        "scoring": "uniform",
        "loss": "softmax",
        "sub_batch_size": 16,
        "filter_ratio": 0.5,
        "num_chunks": 2,
        "gain": 0.0,
        "normalization": "mean",
        "sampler": "top_k",
        "placement": "global",
        "max_per_group": 1,
        "weights": True,
        "precision": "bfloat16",
    }
    assert set(others) == {field.name for field in dataclasses.fields(SelectionPolicy)}
    for name, value in others.items():
        size = {"filter_ratio": None} if name == "sub_batch_size" else {}
        changed = dataclasses.replace(base, **size | {name: value})
        assert policy_to_wire(changed) != policy_to_wire(base), name


def test_a_schedule_takes_the_place_of_the_number():
    ramp = Schedule(start=0.2, shape="linear", end=0.8, steps=100, warmup_steps=5)
    wire = policy_to_wire(SelectionPolicy(filter_ratio=ramp, gain=ramp))
    expected = pb.Schedule(shape=pb.Schedule.SHAPE_LINEAR, start=0.2, end=0.8, steps=100, warmup_steps=5)
    assert (wire.WhichOneof("size"), wire.filter_ratio_schedule) == ("filter_ratio_schedule", expected)
    assert (wire.HasField("gain"), wire.gain_schedule) == (False, expected)


def test_a_gain_of_zero_is_sent_and_not_left_out():
    wire = policy_to_wire(SelectionPolicy(filter_ratio=0.8, gain=0))
    assert wire.HasField("gain")
    assert wire.gain == 0.0


def test_a_filter_ratio_travels_as_the_decimal_that_was_written():
    assert policy_to_wire(SelectionPolicy(filter_ratio=0.8)).filter_ratio == "0.8"


def test_what_a_server_leaves_unset_has_the_contract_s_defaults():
    policy = policy_from_wire(pb.SelectionPolicy(filter_ratio="0.8"))
    assert policy == SelectionPolicy(
        scoring="learnability",
        loss="sigmoid",
        filter_ratio=0.8,
        num_chunks=16,
        gain=1.0,
        normalization="sum",
        sampler="gumbel",
        placement="per_rank",
        max_per_group=None,
        weights=False,
        precision="float32",
    )


def test_a_schedule_without_a_shape_is_constant():
    policy = policy_from_wire(pb.SelectionPolicy(filter_ratio="0.8", gain_schedule=pb.Schedule(start=2.0)))
    assert policy.gain == Schedule(start=2.0, shape="constant")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (pb.SelectionPolicy(filter_ratio="much"), "could not convert"),
        (pb.SelectionPolicy(filter_ratio="1.5"), r"filter_ratio \(1.5\) must lie in"),
        (pb.SelectionPolicy(sub_batch_size=4), r"num_chunks \(16\) is larger than the sub-batch \(4\)"),
    ],
)
def test_a_policy_that_cannot_be_read_is_refused(message, expected):
    with pytest.raises(ValueError, match=expected):
        policy_from_wire(message)


CONSTANT = pb.Schedule(start=2.0)


@pytest.mark.parametrize(
    ("message", "field", "says"),
    [
        (pb.SelectionPolicy(filter_ratio="0.8", loss=77), "policy.loss", "policy.loss is 77, expected one of LOSS_SIG"),
        (pb.SelectionPolicy(), "policy.size", "policy.size is not set, expected one of sub_batch_size, filter_ratio"),
        (
            pb.SelectionPolicy(filter_ratio="0.8", gain=2, gain_schedule=CONSTANT),
            "policy.gain_schedule",
            "policy.gain_schedule is set beside gain (2), expected one of the two",
        ),
        (
            pb.SelectionPolicy(filter_ratio="0.8", gain_schedule=pb.Schedule(start=2, steps=3)),
            "policy.gain_schedule",
            "policy.gain_schedule: steps (3) must be None for the shape 'constant'",
        ),
        (
            pb.SelectionPolicy(filter_ratio_schedule=pb.Schedule(start=2, shape=9)),
            "policy.filter_ratio_schedule.shape",
            "policy.filter_ratio_schedule.shape is 9, expected one of SHAPE_CONSTANT",
        ),
    ],
)
def test_a_field_that_cannot_be_read_is_named(message, field, says):
    with pytest.raises(FieldError) as caught:
        policy_from_wire(message)
    assert caught.value.field == field
    assert str(caught.value).startswith(says)


def test_plain_values_hold_only_what_is_set():
    message = pb.SelectionPolicy(filter_ratio="0.8", scoring=pb.SCORING_UNIFORM, gain_schedule=CONSTANT)
    assert values_from_wire(message) == {
        "filter_ratio": "0.8",
        "scoring": "uniform",
        "gain_schedule": {"shape": "constant", "start": 2.0, "warmup_steps": 0},
        "weights": False,
    }


@pytest.mark.parametrize("fields", POLICIES, ids=str)
def test_plain_values_mean_the_same_policy_as_their_message(fields):
    policy = SelectionPolicy(**{"filter_ratio": 0.8} | fields)
    message = policy_to_wire(policy)
    assert policy_from_values(values_from_wire(message)) == policy
    assert values_to_wire(values_from_wire(message)) == message


def test_a_gain_beside_its_schedule_is_not_sent():
    wire = values_to_wire({"sub_batch_size": 16, "gain": 1.0, "gain_schedule": {"shape": "constant", "start": 2.0}})
    assert (wire.HasField("gain"), wire.gain_schedule.start) == (False, 2.0)
