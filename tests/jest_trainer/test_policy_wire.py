from __future__ import annotations

import dataclasses

import pytest

import jest_core
import jest_trainer as jest
from jest_proto.v1 import jobs_pb2 as pb
from jest_trainer.policy_wire import policy_from_wire, policy_to_wire

POLICIES = [
    {},
    {"scoring": "easy_reference", "loss": "softmax"},
    {"scoring": "hard_learner", "loss": "pairwise", "normalization": "mean"},
    {"scoring": "uniform", "loss": "per_example", "sampler": "top_k"},
    {"placement": "global", "precision": "bfloat16", "weights": True},
    {"max_per_group": 3, "num_chunks": 1},
    {"gain": 0},
    {"gain": 0.1},
    {"gain": jest.Schedule(start=2.0, warmup_steps=10)},
    {"gain": jest.Schedule(start=0.0, shape="linear", end=3.0, steps=100)},
    {"filter_ratio": 0},
    {"filter_ratio": 0.1 + 0.2},
    {"filter_ratio": jest.Schedule(start=0.1, shape="cosine", end=0.9, steps=7, warmup_steps=3)},
    {"filter_ratio": None, "sub_batch_size": 32},
    {"filter_ratio": None, "sub_batch_size": 32, "gain": jest.Schedule(start=1.5)},
]


@pytest.mark.parametrize("fields", POLICIES, ids=str)
def test_a_policy_comes_back_as_it_was_sent(fields):
    policy = jest.SelectionPolicy(**{"filter_ratio": 0.8} | fields)
    wire = pb.SelectionPolicy.FromString(policy_to_wire(policy).SerializeToString())
    assert policy_from_wire(wire) == policy


def test_each_field_of_a_policy_changes_what_is_sent():
    base = jest.SelectionPolicy(filter_ratio=0.8)
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
    assert set(others) == {field.name for field in dataclasses.fields(jest_core.SelectionPolicy)}
    for name, value in others.items():
        size = {"filter_ratio": None} if name == "sub_batch_size" else {}
        changed = dataclasses.replace(base, **size | {name: value})
        assert policy_to_wire(changed) != policy_to_wire(base), name


def test_a_schedule_takes_the_place_of_the_number():
    ramp = jest.Schedule(start=0.2, shape="linear", end=0.8, steps=100, warmup_steps=5)
    wire = policy_to_wire(jest.SelectionPolicy(filter_ratio=ramp, gain=ramp))
    expected = pb.Schedule(shape=pb.Schedule.SHAPE_LINEAR, start=0.2, end=0.8, steps=100, warmup_steps=5)
    assert (wire.WhichOneof("size"), wire.filter_ratio_schedule) == ("filter_ratio_schedule", expected)
    assert (wire.HasField("gain"), wire.gain_schedule) == (False, expected)


def test_a_gain_of_zero_is_sent_and_not_left_out():
    wire = policy_to_wire(jest.SelectionPolicy(filter_ratio=0.8, gain=0))
    assert wire.HasField("gain")
    assert wire.gain == 0.0


def test_a_filter_ratio_travels_as_the_decimal_that_was_written():
    assert policy_to_wire(jest.SelectionPolicy(filter_ratio=0.8)).filter_ratio == "0.8"


def test_what_a_server_leaves_unset_has_the_contract_s_defaults():
    policy = policy_from_wire(pb.SelectionPolicy(filter_ratio="0.8"))
    assert policy == jest.SelectionPolicy(
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
    assert policy.gain == jest.Schedule(start=2.0, shape="constant")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (pb.SelectionPolicy(filter_ratio="0.8", loss=77), r"loss \('77'\) must be one of"),
        (pb.SelectionPolicy(filter_ratio="much"), "could not convert"),
        (pb.SelectionPolicy(), "exactly one of sub_batch_size"),
    ],
)
def test_a_policy_that_cannot_be_read_is_refused(message, expected):
    with pytest.raises(ValueError, match=expected):
        policy_from_wire(message)
