import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jest_core import SelectionPolicy


def test_the_defaults_are_the_published_method():
    policy = SelectionPolicy(filter_ratio=0.8)
    assert policy.to_dict() == {
        "scoring": "learnability",
        "loss": "sigmoid",
        "sub_batch_size": None,
        "filter_ratio": 0.8,
        "num_chunks": 16,
        "gain": 1.0,
        "normalization": "sum",
        "sampler": "gumbel",
        "placement": "per_rank",
        "max_per_group": None,
        "weights": False,
        "precision": "float32",
    }


@pytest.mark.parametrize(
    ("super_batch_size", "filter_ratio", "sub_batch_size"),
    [(163_840, 0.8, 32_768), (65_536, 0.5, 32_768), (327_680, 0.9, 32_768), (100, 0, 100), (99, 0.33, 66)],
)
def test_the_sub_batch_size_is_exact_where_floating_point_is_not(super_batch_size, filter_ratio, sub_batch_size):
    policy = SelectionPolicy(filter_ratio=filter_ratio)
    assert policy.resolve_sub_batch_size(super_batch_size) == sub_batch_size


def test_floating_point_would_have_lost_a_row():
    assert int(163_840 * (1 - 0.8)) == 32_767


@given(size=st.integers(1, 10**6), percent=st.integers(0, 99))
def test_the_sub_batch_size_is_the_floor_of_the_decimal_share(size, percent):
    expected = math.floor(Fraction(size * (100 - percent), 100))
    policy = SelectionPolicy(filter_ratio=percent / 100, num_chunks=1)
    if expected == 0:
        with pytest.raises(ValueError, match="leaves nothing"):
            policy.resolve_sub_batch_size(size)
    else:
        assert policy.resolve_sub_batch_size(size) == expected


def test_a_given_sub_batch_size_is_taken_as_it_is():
    assert SelectionPolicy(sub_batch_size=20).resolve_sub_batch_size(20) == 20


@pytest.mark.parametrize(
    ("fields", "super_batch_size", "message"),
    [
        ({"sub_batch_size": 20}, 19, r"sub_batch_size \(20\) is larger than the super-batch \(19\)"),
        ({"filter_ratio": 0.8}, 4, r"filter_ratio \(0.8\) leaves nothing of a super-batch of 4"),
        ({"filter_ratio": 0.8}, 25, r"num_chunks \(16\) is larger than the sub-batch \(5\)"),
        ({"filter_ratio": 0.8}, 0, r"super_batch_size \(0\) must be an integer of at least 1"),
        ({"filter_ratio": 0.8}, 10.0, r"super_batch_size \(10.0\) must be an integer of at least 1"),
    ],
)
def test_a_super_batch_that_cannot_give_the_sub_batch_is_an_error(fields, super_batch_size, message):
    with pytest.raises(ValueError, match=message):
        SelectionPolicy(**fields).resolve_sub_batch_size(super_batch_size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"exactly one of sub_batch_size \(None\) and filter_ratio \(None\)"),
        ({"sub_batch_size": 32, "filter_ratio": 0.5}, r"exactly one of sub_batch_size \(32\) and filter_ratio \(0.5\)"),
        ({"sub_batch_size": 0}, r"sub_batch_size \(0\) must be an integer of at least 1"),
        ({"sub_batch_size": 32.0}, r"sub_batch_size \(32.0\) must be an integer"),
        ({"sub_batch_size": True}, r"sub_batch_size \(True\) must be an integer"),
        ({"sub_batch_size": 5, "num_chunks": 7}, r"num_chunks \(7\) is larger than the sub-batch \(5\)"),
        ({"filter_ratio": 1.0}, r"filter_ratio \(1.0\) must lie in \[0, 1\)"),
        ({"filter_ratio": -0.1}, r"filter_ratio \(-0.1\) must lie in \[0, 1\)"),
        ({"filter_ratio": math.nan}, r"filter_ratio \(nan\) must be a finite number"),
        ({"filter_ratio": "0.8"}, r"filter_ratio \('0.8'\) must be a finite number"),
        ({"num_chunks": 0}, r"num_chunks \(0\) must be an integer of at least 1"),
        ({"num_chunks": 2.0}, r"num_chunks \(2.0\) must be an integer"),
        ({"gain": -1.0}, r"gain \(-1.0\) must be at least 0"),
        ({"gain": math.inf}, r"gain \(inf\) must be a finite number"),
        ({"gain": True}, r"gain \(True\) must be a finite number"),
        ({"scoring": "loss"}, r"scoring \('loss'\) must be one of learnability, easy_reference"),
        ({"gain": None}, r"gain \(None\) must be a finite number"),
        ({"loss": "triplet"}, r"loss \('triplet'\) must be one of sigmoid, softmax, pairwise, per_example"),
        ({"normalization": "none"}, r"normalization \('none'\) must be one of sum, mean"),
        ({"sampler": "random"}, r"sampler \('random'\) must be one of gumbel, top_k"),
        ({"placement": None}, r"placement \(None\) must be one of per_rank, global"),
        ({"precision": "float16"}, r"precision \('float16'\) must be one of float32, bfloat16"),
        ({"max_per_group": 0}, r"max_per_group \(0\) must be an integer of at least 1"),
        ({"max_per_group": 2.0}, r"max_per_group \(2.0\) must be an integer of at least 1"),
        ({"weights": 1}, r"weights \(1\) must be true or false"),
    ],
)
def test_a_policy_that_makes_no_sense_is_an_error(fields, message):
    size = {"filter_ratio": 0.5} if fields and not fields.keys() & {"sub_batch_size", "filter_ratio"} else {}
    with pytest.raises(ValueError, match=message):
        SelectionPolicy(**fields, **size)


def test_a_policy_survives_json():
    policy = SelectionPolicy(
        scoring="hard_learner",
        loss="softmax",
        sub_batch_size=64,
        num_chunks=4,
        gain=0.25,
        normalization="mean",
        sampler="top_k",
        placement="global",
        max_per_group=3,
        weights=True,
        precision="bfloat16",
    )
    assert SelectionPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_absent_fields_take_their_defaults():
    assert SelectionPolicy.from_dict({"filter_ratio": 0.5}) == SelectionPolicy(filter_ratio=0.5)


def test_an_unknown_field_is_an_error():
    with pytest.raises(ValueError, match=r"unknown policy fields: gian \(known: filter_ratio, gain"):
        SelectionPolicy.from_dict({"filter_ratio": 0.5, "gian": 2.0})


@pytest.mark.parametrize(
    ("scoring", "signs"),
    [("learnability", (1, -1)), ("easy_reference", (0, -1)), ("hard_learner", (1, 0)), ("uniform", (0, 0))],
)
def test_the_scoring_says_whose_losses_count(scoring, signs):
    policy = SelectionPolicy(sub_batch_size=16, scoring=scoring)
    assert policy.loss_signs == signs
    assert (policy.scores_learner, policy.scores_reference) == (signs[0] != 0, signs[1] != 0)


@pytest.mark.parametrize(
    ("scoring", "loss", "needed"),
    [
        ("learnability", "sigmoid", True),
        ("easy_reference", "pairwise", True),
        ("learnability", "per_example", False),
        ("hard_learner", "softmax", False),
        ("uniform", "sigmoid", False),
    ],
)
def test_a_reference_model_is_needed_where_its_losses_count_and_the_learner_does_not_bring_them(scoring, loss, needed):
    assert SelectionPolicy(sub_batch_size=16, scoring=scoring, loss=loss).needs_reference_model is needed
