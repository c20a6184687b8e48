import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jest_core_oracle as oracle
from jest_core import Embeddings, SelectionPolicy, conditional_logits, select_sub_batch
from jest_core_samples import any_embeddings, exact, random_embeddings, random_pair

SCORINGS = st.sampled_from(["learnability", "easy_reference", "hard_learner", "uniform"])


@given(data=st.data(), size=st.integers(1, 40), scoring=SCORINGS, mean=st.booleans(), gain=st.floats(0.01, 10))
def test_logits_equal_the_oracle(data, size, scoring, mean, gain):
    learner, reference = data.draw(any_embeddings(size)), data.draw(any_embeddings(size))
    chosen = data.draw(st.lists(st.integers(0, size - 1), unique=True))
    policy = SelectionPolicy(
        scoring=scoring, filter_ratio=0, gain=gain, normalization="mean" if mean else "sum", num_chunks=1
    )
    logits = conditional_logits(learner, reference, policy, chosen)
    dense = oracle.score_matrix(scoring, exact(learner), exact(reference))
    expected = oracle.conditional_logits(dense, chosen, gain=gain, mean=mean)
    assert logits.dtype == torch.float32
    terms = 1 if mean else 1 + 2 * len(chosen)
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5, atol=3e-5 * gain * terms)


@pytest.mark.parametrize("tile", [(1, 1), (7, 3), (64, 64)])
def test_logits_do_not_depend_on_how_the_products_are_tiled(monkeypatch, tile):
    learner, reference = random_pair(50, seed=1)
    policy, chosen = SelectionPolicy(filter_ratio=0.5), list(range(0, 50, 3))
    whole = conditional_logits(learner, reference, policy, chosen)
    monkeypatch.setattr("jest_core.tiles.TILE_ROWS", tile[0])
    monkeypatch.setattr("jest_core.tiles.TILE_COLUMNS", tile[1])
    torch.testing.assert_close(conditional_logits(learner, reference, policy, chosen), whole, rtol=1e-5, atol=1e-4)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), order=st.permutations(range(12)), num_chosen=st.integers(0, 12))
def test_permuting_the_rows_permutes_the_logits(seed, order, num_chosen):
    learner, reference = random_pair(12, seed)
    shuffled = [Embeddings(m.image[order], m.text[order], m.scale, m.bias) for m in (learner, reference)]
    policy = SelectionPolicy(filter_ratio=0.5, num_chunks=2)
    logits = conditional_logits(learner, reference, policy, order[:num_chosen])
    permuted = conditional_logits(*shuffled, policy, list(range(num_chosen)))
    torch.testing.assert_close(permuted, logits[order], rtol=1e-5, atol=1e-4)


def test_a_learner_that_is_its_own_reference_finds_nothing_learnable():
    model = random_embeddings(30, seed=3)
    logits = conditional_logits(model, model, SelectionPolicy(filter_ratio=0.5, num_chunks=1), [1, 5, 9])
    assert torch.equal(logits, torch.zeros(30))


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_products_of_16_bit_embeddings_are_not_rounded_to_16_bits(scale):
    model = random_embeddings(64, seed=4, width=256, scale=scale, bias=0.0, dtype=torch.bfloat16)
    policy = SelectionPolicy(scoring="hard_learner", filter_ratio=0.5)
    logits = conditional_logits(model, None, policy, [0])
    expected = oracle.conditional_logits(oracle.pair_losses(exact(model)), [0])
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5, atol=1e-5 * scale)


def test_chosen_rows_may_come_as_a_tensor():
    learner, reference = random_pair(10, seed=0)
    policy = SelectionPolicy(filter_ratio=0.5, num_chunks=1)
    expected = conditional_logits(learner, reference, policy, [4, 2])
    for dtype in (torch.int64, torch.int32):
        rows = torch.tensor([4, 2], dtype=dtype)
        assert torch.equal(conditional_logits(learner, reference, policy, rows), expected)


def test_strided_embeddings_are_as_good_as_contiguous_ones():
    model = random_embeddings(20, seed=6)
    strided = Embeddings(model.image.T.contiguous().T, model.text.repeat(1, 2)[:, :16], model.scale, model.bias)
    policy = SelectionPolicy(scoring="hard_learner", filter_ratio=0.5, num_chunks=1)
    torch.testing.assert_close(
        conditional_logits(strided, None, policy, [3, 4]), conditional_logits(model, None, policy, [3, 4])
    )


def test_a_trainers_autocast_and_gradients_stay_outside():
    learner, reference = random_pair(40, seed=7)
    policy = SelectionPolicy(filter_ratio=0.5)
    expected = conditional_logits(learner, reference, policy, [3, 4, 5])
    selection = select_sub_batch(learner, reference, policy, seed=1)
    tracked = Embeddings(reference.image.requires_grad_(), reference.text.requires_grad_(), 14.0, -5.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = conditional_logits(learner, tracked, policy, [3, 4, 5])
        inside = select_sub_batch(learner, tracked, policy, seed=1)
    assert not logits.requires_grad
    assert torch.equal(logits, expected)
    assert torch.equal(inside.positions, selection.positions)
    assert inside.perplexity == selection.perplexity


def test_only_the_products_that_the_scoring_needs_are_computed(monkeypatch):
    learner, reference = random_pair(20, seed=8)
    calls = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: (calls.append(1), addmm(*args, **kwargs))[1])
    counts = {}
    for scoring in ("learnability", "easy_reference", "hard_learner", "uniform"):
        calls.clear()
        conditional_logits(learner, reference, SelectionPolicy(scoring=scoring, filter_ratio=0, num_chunks=1), [1])
        counts[scoring] = len(calls)
    assert counts == {"learnability": 4, "easy_reference": 2, "hard_learner": 2, "uniform": 0}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([0, 10], "chosen holds row 10, outside the super-batch of 10 rows"),
        ([-1], "chosen holds row -1, outside the super-batch of 10 rows"),
        ([3, 4, 3], "chosen must not hold a row twice"),
        ([0.5], "chosen must be a list of row numbers, not torch.float32"),
        (torch.ones(2, 2, dtype=torch.int64), r"chosen must be a list of row numbers, .* shape \[2, 2\]"),
        (torch.ones(10, dtype=torch.bool), "chosen must be a list of row numbers, not torch.bool"),
    ],
)
def test_chosen_rows_that_are_no_set_of_rows_are_an_error(chosen, message):
    learner, reference = random_pair(10, seed=0)
    with pytest.raises(ValueError, match=message):
        conditional_logits(learner, reference, SelectionPolicy(filter_ratio=0, num_chunks=1), chosen)
