"""Selections, drawn thousands of times, against probabilities worked out by enumeration.

Each law stands beside laws that are nearly right, a wrong gain or a forgotten term, which the same draws must refute.
"""

from collections import Counter

import numpy as np
import pytest
import torch

import jest_core_oracle as oracle
from jest_core import SelectionPolicy, select_sub_batch
from jest_core_samples import exact, random_embeddings
from jest_core_statistics import fit

pytestmark = pytest.mark.usefixtures("one_thread")

LEARNER = random_embeddings(6, seed=21, width=3, scale=2.5, bias=0.5)
REFERENCE = random_embeddings(6, seed=22, width=4, scale=2.0, bias=-0.5)
RANKS = [0, 1, 1, 0, 0, 1]
GAIN = 0.8
RIGHT, REFUTED = 1e-3, 1e-6


def sigmoid_logits(gain: float) -> oracle.LogitsOf:
    scores = oracle.score_matrix("learnability", exact(LEARNER), exact(REFERENCE))
    return lambda chosen: oracle.conditional_logits(scores, chosen, gain=gain)


def softmax_logits(gain: float) -> oracle.LogitsOf:
    learner, reference = exact(LEARNER), exact(REFERENCE)
    return lambda chosen: oracle.softmax_logits("learnability", learner, reference, chosen, gain=gain)


def nearly_sigmoid() -> dict[str, oracle.LogitsOf]:
    scores = oracle.score_matrix("learnability", exact(LEARNER), exact(REFERENCE))
    return {
        "half as much gain again": sigmoid_logits(1.5 * GAIN),
        "nothing but the own pair": lambda _: GAIN * np.diag(scores),
        "images with chosen texts only": lambda chosen: GAIN * (np.diag(scores) + scores[:, list(chosen)].sum(1)),
        "texts with chosen images only": lambda chosen: GAIN * (np.diag(scores) + scores[list(chosen)].sum(0)),
        "no own pair": lambda chosen: GAIN * (scores + scores.T)[:, list(chosen)].sum(1),
        "mean instead of sum": lambda chosen: oracle.conditional_logits(scores, chosen, gain=GAIN, mean=True),
    }


def nearly_softmax() -> dict[str, oracle.LogitsOf]:
    right, own = softmax_logits(GAIN), softmax_logits(GAIN)(())

    def with_the_row_itself(chosen: list[int]) -> np.ndarray:
        return np.array([right([*chosen, row])[row] for row in range(6)]) if chosen else own

    return {
        "half as much gain again": softmax_logits(1.5 * GAIN),
        "nothing but the own pair": lambda _: own,
        "no half": lambda chosen: 2 * right(chosen) - own,
        "no own pair": lambda chosen: right(chosen) - own if chosen else own,
        "the row itself in its denominators": with_the_row_itself,
    }


def drawn(policy: SelectionPolicy, times: int, **limits: object) -> Counter:
    return Counter(
        tuple(select_sub_batch(LEARNER, REFERENCE, policy, seed=seed, **limits).positions.tolist())
        for seed in range(times)
    )


def as_sets(draws: Counter) -> Counter:
    sets: Counter = Counter()
    for selection, times in draws.items():
        sets[frozenset(selection)] += times
    return sets


@pytest.mark.parametrize("placement", ["per_rank", "global"])
@pytest.mark.parametrize(
    ("loss", "right", "nearly_right"),
    [
        ("sigmoid", sigmoid_logits(GAIN), nearly_sigmoid()),
        ("softmax", softmax_logits(GAIN), nearly_softmax()),
    ],
    ids=["sigmoid", "softmax"],
)
def test_selections_follow_the_enumerated_joint_law(loss, right, nearly_right, placement):
    policy = SelectionPolicy(loss=loss, gain=GAIN, placement=placement, sub_batch_size=4, num_chunks=3)
    draws = drawn(policy, 2500, rank_of_row=torch.tensor(RANKS))
    sizes = oracle.chunk_sizes(4, 3)
    rules = oracle.Rules.for_rows(6, ranks=RANKS if placement == "per_rank" else [0] * 6)
    law = oracle.joint_law(right, sizes, rules)
    assert sum(law.values()) == pytest.approx(1)
    assert fit(draws, law) > RIGHT
    assert fit(as_sets(draws), oracle.of_sets(law)) > RIGHT
    refuted = {name: fit(draws, oracle.joint_law(wrong, sizes, rules)) for name, wrong in nearly_right.items()}
    assert max(refuted.values()) < REFUTED, refuted


@pytest.mark.parametrize(
    ("loss", "right"),
    [("sigmoid", sigmoid_logits(GAIN)), ("softmax", softmax_logits(GAIN))],
    ids=["sigmoid", "softmax"],
)
def test_keys_and_groups_leave_the_law_of_the_rows_that_they_allow(loss, right):
    keys, groups = ["a", "b", "c", "d", "e", "a"], ["x", "x", "y", None, None, "x"]
    rules = oracle.Rules.for_rows(6, keys=keys, groups=groups, limit=1)
    policy = SelectionPolicy(loss=loss, gain=GAIN, sub_batch_size=3, num_chunks=2, max_per_group=1)
    draws = drawn(policy, 2500, example_keys=keys, group_labels=groups)
    assert fit(draws, oracle.joint_law(right, [1, 2], rules)) > RIGHT
    without_groups = oracle.Rules.for_rows(6, keys=keys)
    assert fit(draws, oracle.joint_law(right, [1, 2], without_groups)) < REFUTED


def test_a_learner_that_equals_its_reference_is_sampled_uniformly():
    policy = SelectionPolicy(sub_batch_size=2, num_chunks=2)
    draws = Counter(
        tuple(select_sub_batch(LEARNER, LEARNER, policy, seed=seed).positions.tolist()) for seed in range(2000)
    )
    assert fit(draws, oracle.draw_law(np.zeros(6), range(6), 2)) > RIGHT
