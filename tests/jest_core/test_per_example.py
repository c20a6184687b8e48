"""Losses of single examples: independent selection (RHO-LOSS, arXiv 2206.07137; hard; easy)."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import jest_core_oracle as oracle
from jest_core import ExampleLosses, SelectionPolicy, conditional_logits, select_sub_batch
from jest_core_samples import exact_losses, random_embeddings, random_example_losses
from jest_core_statistics import fit

pytestmark = pytest.mark.usefixtures("one_thread")

LEARNER, REFERENCE = random_example_losses(50, seed=1), random_example_losses(50, seed=2)
SCORES = {
    "learnability": exact_losses(LEARNER) - exact_losses(REFERENCE),
    "hard_learner": exact_losses(LEARNER),
    "easy_reference": -exact_losses(REFERENCE),
}


@pytest.mark.parametrize("scoring", SCORES)
@pytest.mark.parametrize("num_chunks", [1, 2, 7, 20])
def test_top_k_takes_the_best_in_order_whatever_the_number_of_chunks(scoring, num_chunks):
    policy = SelectionPolicy(
        loss="per_example", scoring=scoring, sub_batch_size=20, num_chunks=num_chunks, sampler="top_k"
    )
    selection = select_sub_batch(LEARNER, REFERENCE, policy, seed=0)
    assert selection.positions.tolist() == np.argsort(-SCORES[scoring])[:20].tolist()


@pytest.mark.parametrize("scoring", SCORES)
@pytest.mark.parametrize("normalization", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_do_not_depend_on_what_is_chosen(scoring, normalization, dtype):
    policy = SelectionPolicy(loss="per_example", scoring=scoring, filter_ratio=0, gain=1.5, normalization=normalization)
    learner, reference = ExampleLosses(LEARNER.values.to(dtype)), ExampleLosses(REFERENCE.values.to(dtype))
    signs = oracle.SIGNS[scoring]
    expected = 1.5 * (signs[0] * exact_losses(learner) + signs[1] * exact_losses(reference))
    for chosen in ([], [3], list(range(50))):
        logits = conditional_logits(learner, reference, policy, chosen)
        assert logits.dtype == torch.float32
        np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_only_the_losses_that_the_scoring_needs_have_to_be_given():
    hard = SelectionPolicy(loss="per_example", scoring="hard_learner", sub_batch_size=9, num_chunks=3)
    easy = SelectionPolicy(loss="per_example", scoring="easy_reference", sub_batch_size=9, num_chunks=3)
    for policy, alone in ((hard, (LEARNER, None)), (easy, (None, REFERENCE))):
        full = select_sub_batch(LEARNER, REFERENCE, policy, seed=1)
        assert torch.equal(select_sub_batch(*alone, policy, seed=1).positions, full.positions)


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_draws_follow_the_law_of_sampling_without_replacement(num_chunks):
    learner, reference = ExampleLosses(torch.tensor([2.0, 0.5, 1.0, 3.0])), ExampleLosses(torch.ones(4))
    policy = SelectionPolicy(loss="per_example", sub_batch_size=3, num_chunks=num_chunks, gain=0.8)
    draws = Counter(
        tuple(select_sub_batch(learner, reference, policy, seed=seed).positions.tolist()) for seed in range(2000)
    )
    logits = exact_losses(learner) - 1
    assert fit(draws, oracle.draw_law(0.8 * logits, range(4), 3)) > 1e-3
    assert fit(draws, oracle.draw_law(logits, range(4), 3)) < 1e-3


@given(data=st.data(), size=st.integers(1, 40), seed=st.integers(0, 2**64 - 1))
def test_every_choice_is_the_best_one_left(data, size, seed):
    b = data.draw(st.integers(1, size))
    num_chunks = data.draw(st.integers(1, b))
    learner = random_example_losses(size, seed=seed % 1000)
    policy = SelectionPolicy(loss="per_example", scoring="hard_learner", sub_batch_size=b, num_chunks=num_chunks)
    positions = select_sub_batch(learner, None, policy, seed=seed).positions.tolist()
    assert len(positions) == b
    losses = exact_losses(learner)
    for regret in oracle.regrets(positions, num_chunks, lambda _: losses, oracle.Rules.for_rows(size), seed):
        assert regret < 1e-5


@pytest.mark.parametrize(
    ("learner", "reference", "message"),
    [
        (random_embeddings(50, seed=0), REFERENCE, "learner must bring its example losses under loss 'per_example'"),
        (LEARNER, random_embeddings(50, seed=0), "reference must bring its example losses .* not Embeddings"),
        (LEARNER, None, "reference is None, but scoring 'learnability' needs its example losses"),
        (LEARNER, random_example_losses(49, seed=0), r"same everywhere: learner \(50\), reference \(49\)"),
    ],
)
def test_outputs_that_do_not_fit_the_loss_are_an_error(learner, reference, message):
    policy = SelectionPolicy(loss="per_example", sub_batch_size=9, num_chunks=3)
    with pytest.raises(ValueError, match=message):
        select_sub_batch(learner, reference, policy, seed=0)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_losses_are_no_embeddings(loss):
    policy = SelectionPolicy(loss=loss, sub_batch_size=9, num_chunks=3)
    with pytest.raises(ValueError, match=f"learner must bring its embeddings under loss '{loss}', not ExampleLosses"):
        select_sub_batch(LEARNER, REFERENCE, policy, seed=0)
