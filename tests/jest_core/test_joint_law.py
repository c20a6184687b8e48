"""Selections, drawn thousands of times, against probabilities worked out by enumeration."""

from collections import Counter

import numpy as np

import jest_core_oracle as oracle
from jest_core import Embeddings, SelectionPolicy, select_sub_batch
from jest_core_samples import exact, random_embeddings
from jest_core_statistics import fit


def drawn(learner: Embeddings, reference: Embeddings, policy: SelectionPolicy, times: int) -> Counter:
    return Counter(
        tuple(select_sub_batch(learner, reference, policy, seed=seed).positions.tolist()) for seed in range(times)
    )


def test_two_chunks_follow_the_enumerated_joint_law():
    learner = random_embeddings(5, seed=21, width=3, scale=3.0, bias=0.5)
    reference = random_embeddings(5, seed=22, width=4, scale=4.0, bias=-0.5)
    draws = drawn(learner, reference, SelectionPolicy(sub_batch_size=3, num_chunks=2), 4000)
    scores = oracle.score_matrix("learnability", exact(learner), exact(reference))
    assert fit(draws, oracle.joint_law(scores, [1, 2])) > 0.01
    independent = oracle.draw_law(np.diag(scores), range(5), 3)
    assert fit(draws, independent) < 1e-9


def test_a_learner_that_equals_its_reference_is_sampled_uniformly():
    model = random_embeddings(5, seed=23)
    draws = drawn(model, model, SelectionPolicy(sub_batch_size=2, num_chunks=2), 2000)
    uniform = oracle.draw_law(np.zeros(5), range(5), 2)
    assert fit(draws, uniform) > 0.01
