"""Products in bfloat16: how far they may be off, and how little that changes the choice."""

import numpy as np
import pytest
import torch

import jest_core_oracle as oracle
from jest_core import SelectionPolicy, conditional_logits, select_sub_batch
from jest_core_samples import exact, random_embeddings, random_pair_losses

LOSSES = pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
HALF_UNIT = 2**-9
"""The relative error of rounding to 8 significant bits."""


def oracle_logits(loss: str, model: oracle.Model, chosen: list[int]) -> np.ndarray:
    if loss == "softmax":
        return oracle.softmax_logits("hard_learner", model, model, chosen)
    return oracle.conditional_logits(oracle.pair_losses(model), chosen)


@LOSSES
@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_are_within_the_rounding_of_every_product(loss, scale, dtype):
    model = random_embeddings(60, seed=1, width=32, scale=scale, bias=-5.0, dtype=dtype)
    chosen = list(range(0, 60, 4))
    policy = SelectionPolicy(loss=loss, scoring="hard_learner", filter_ratio=0, precision="bfloat16")
    logits = conditional_logits(model, None, policy, chosen).double().numpy()
    # A product of unit rows is rounded once, and so is each of its factors unless it comes in bfloat16.
    roundings = 1 if dtype == torch.bfloat16 else 3
    terms = 1 if loss == "softmax" else 2 * len(chosen)
    bound = 1.02 * roundings * HALF_UNIT * scale * terms + 1e-3
    error = np.abs(logits - oracle_logits(loss, exact(model), chosen)).max()
    assert error < bound
    assert error > 1e-4


@LOSSES
def test_logits_of_the_first_chunk_are_not_rounded(loss):
    learner, reference = random_embeddings(60, seed=2), random_embeddings(60, seed=3)
    exact_policy = SelectionPolicy(loss=loss, filter_ratio=0)
    rounded_policy = SelectionPolicy(loss=loss, filter_ratio=0, precision="bfloat16")
    expected = conditional_logits(learner, reference, exact_policy, [])
    assert torch.equal(conditional_logits(learner, reference, rounded_policy, []), expected)


@LOSSES
@pytest.mark.parametrize("sampler", ["gumbel", "top_k"])
def test_nearly_the_same_rows_are_chosen(loss, sampler):
    learner = random_embeddings(1000, seed=4, width=64, scale=10.0, bias=-10.0)
    reference = random_embeddings(1000, seed=5, width=64, scale=10.0, bias=-10.0)
    chosen = {
        precision: set(
            select_sub_batch(
                learner,
                reference,
                SelectionPolicy(loss=loss, sub_batch_size=200, num_chunks=8, sampler=sampler, precision=precision),
                seed=6,
            ).positions.tolist()
        )
        for precision in ("float32", "bfloat16")
    }
    assert len(chosen["float32"] & chosen["bfloat16"]) >= 195


@LOSSES
def test_the_same_seed_gives_the_same_selection_again(loss):
    models = random_embeddings(300, seed=7), random_embeddings(300, seed=8)
    policy = SelectionPolicy(loss=loss, sub_batch_size=90, num_chunks=5, precision="bfloat16", weights=True)
    first, second = (select_sub_batch(*models, policy, seed=9) for _ in range(2))
    assert torch.equal(first.positions, second.positions)
    assert first.perplexity == second.perplexity
    assert torch.equal(first.weights, second.weights)


@LOSSES
def test_weights_are_nearly_those_of_exact_products(loss):
    models = random_embeddings(200, seed=10), random_embeddings(200, seed=11)
    # With the gain at zero, both choose the same rows.
    by_precision = [
        select_sub_batch(
            *models,
            SelectionPolicy(loss=loss, gain=0, sub_batch_size=50, num_chunks=5, precision=precision, weights=True),
            seed=1,
        ).weights
        for precision in ("float32", "bfloat16")
    ]
    torch.testing.assert_close(by_precision[1], by_precision[0], rtol=0, atol=0.1)


def test_losses_that_are_given_are_not_rounded():
    losses = random_pair_losses(40, seed=12)
    by_precision = [
        conditional_logits(
            losses,
            None,
            SelectionPolicy(loss="pairwise", scoring="hard_learner", filter_ratio=0, precision=precision),
            [1, 2, 3],
        )
        for precision in ("float32", "bfloat16")
    ]
    assert torch.equal(*by_precision)
