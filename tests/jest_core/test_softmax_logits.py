import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jest_core_oracle as oracle
from jest_core import Embeddings, SelectionPolicy, conditional_logits, select_sub_batch
from jest_core_samples import any_embeddings, exact, random_embeddings, random_pair

POLICY = SelectionPolicy(loss="softmax", filter_ratio=0, num_chunks=1)


@given(
    data=st.data(),
    size=st.integers(1, 30),
    scoring=st.sampled_from(list(oracle.SIGNS)),
    mean=st.booleans(),
    gain=st.just(0.0) | st.floats(0.01, 10),
)
def test_logits_equal_the_oracle(data, size, scoring, mean, gain):
    learner, reference = data.draw(any_embeddings(size)), data.draw(any_embeddings(size))
    chosen = data.draw(st.lists(st.integers(0, size - 1), unique=True))
    policy = SelectionPolicy(
        loss="softmax",
        scoring=scoring,
        filter_ratio=0,
        num_chunks=1,
        gain=gain,
        normalization="mean" if mean else "sum",
    )
    logits = conditional_logits(learner, reference, policy, chosen)
    expected = oracle.softmax_logits(scoring, exact(learner), exact(reference), chosen, gain=gain)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5, atol=1e-6 * gain * (learner.scale + 100))


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_thousands_neither_overflow_nor_vanish(sign):
    # exp(89) is more than float32 holds, exp(-104) less: here every logit is beyond one of them.
    model = random_embeddings(20, seed=1, width=4)
    shared = torch.ones(20, 1)
    large = Embeddings(torch.cat([model.image, shared], 1), torch.cat([model.text, sign * shared], 1), scale=5000.0)
    policy = SelectionPolicy(loss="softmax", scoring="hard_learner", filter_ratio=0, num_chunks=1)
    logits = conditional_logits(large, None, policy, [3, 1, 4])
    expected = oracle.softmax_logits("hard_learner", exact(large), exact(large), [3, 1, 4])
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5, atol=5e-3)


def test_one_far_logit_does_not_swallow_the_others():
    # Tiles of one: the running maximum leaps from -300 to 300 and stays.
    model = Embeddings(torch.ones(3, 1), torch.tensor([[-3.0], [3.0], [2.9999]]), scale=100.0)
    policy = SelectionPolicy(loss="softmax", scoring="hard_learner", filter_ratio=0, num_chunks=1)
    logits = conditional_logits(model, None, policy, [0, 1, 2])
    expected = oracle.softmax_logits("hard_learner", exact(model), exact(model), [0, 1, 2])
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), order=st.permutations(range(25)), columns=st.integers(1, 9), rows=st.integers(1, 30))
def test_denominators_grown_piece_by_piece_equal_those_of_all_at_once(seed, order, columns, rows):
    learner, reference = random_pair(25, seed)
    chosen = order[:13]
    whole = conditional_logits(learner, reference, POLICY, chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jest_core.tiles.TILE_COLUMNS", columns)
        patch.setattr("jest_core.tiles.TILE_ROWS", rows)
        pieces = conditional_logits(learner, reference, POLICY, chosen)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=2e-5)


def test_the_order_of_the_chosen_rows_does_not_matter():
    pair = random_pair(40, seed=2)
    chosen = list(range(0, 40, 3))
    forwards = conditional_logits(*pair, POLICY, chosen)
    torch.testing.assert_close(conditional_logits(*pair, POLICY, chosen[::-1]), forwards, rtol=1e-5, atol=1e-5)


def test_a_bias_changes_nothing():
    model = random_embeddings(20, seed=3, bias=0.0)
    moved = Embeddings(model.image, model.text, model.scale, bias=-700.0)
    reference = random_embeddings(20, seed=4)
    for chosen in ([], [5, 6]):
        logits = conditional_logits(model, reference, POLICY, chosen)
        assert torch.equal(conditional_logits(moved, reference, POLICY, chosen), logits)


def test_a_learner_that_is_its_own_reference_finds_every_row_alike():
    model = random_embeddings(30, seed=5, scale=100.0)
    for chosen in ([], [1, 5, 9]):
        logits = conditional_logits(model, model, POLICY, chosen)
        assert torch.equal(logits, logits[:1].expand(30))
    selection = select_sub_batch(model, model, SelectionPolicy(loss="softmax", filter_ratio=0.5, num_chunks=5), seed=0)
    assert selection.perplexity == pytest.approx([30, 27, 24, 21, 18])


def test_a_chosen_row_that_is_alone_has_lost_nothing():
    # Its image knows of no other text: log(exp(x) / exp(x)).
    model = random_embeddings(10, seed=6)
    policy = SelectionPolicy(loss="softmax", scoring="hard_learner", filter_ratio=0, num_chunks=1)
    assert abs(float(conditional_logits(model, None, policy, [7])[7])) < 1e-6


def test_normalization_makes_no_difference():
    pair = random_pair(60, seed=7)
    by_sum, by_mean = (
        select_sub_batch(
            *pair, SelectionPolicy(loss="softmax", filter_ratio=0.5, num_chunks=6, normalization=normalization), seed=3
        )
        for normalization in ("sum", "mean")
    )
    assert torch.equal(by_sum.positions, by_mean.positions)
    assert by_sum.perplexity == by_mean.perplexity
