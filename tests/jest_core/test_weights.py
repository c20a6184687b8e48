"""What each chosen pair is worth inside the sub-batch, and nowhere else."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import jest_core_oracle as oracle
from jest_core import Embeddings, ExampleLosses, PairLosses, Selection, SelectionPolicy, select_sub_batch
from jest_core_samples import (
    exact,
    exact_losses,
    random_embeddings,
    random_example_losses,
    random_pair,
    random_pair_losses,
)

SCORINGS = st.sampled_from(["learnability", "hard_learner"])
SIZES = {"size": st.integers(1, 40), "kept": st.integers(1, 40), "seed": st.integers(0, 1000)}


def chosen_with_weights(learner, reference, kept: int, **fields: object) -> Selection:
    kept = min(kept, len(learner))
    policy = SelectionPolicy(sub_batch_size=kept, num_chunks=min(3, kept), weights=True, **fields)
    return select_sub_batch(learner, reference, policy, seed=1)


def assert_weights_are(selection: Selection, worth: np.ndarray) -> None:
    assert selection.weights is not None
    assert selection.weights.dtype == torch.float32
    assert selection.weights.shape == selection.positions.shape
    # Each of a row's pairs adds the rounding of a logit of about ten.
    rounding = 1e-5 * (1 + 2 * len(worth)) / max(np.maximum(worth, 0).mean(), 1e-9)
    np.testing.assert_allclose(selection.weights.numpy(), oracle.weights(worth), rtol=1e-4, atol=rounding)


@given(**SIZES, scoring=SCORINGS, gain=st.sampled_from([0.0, 0.1, 2.0]), mean=st.booleans())
def test_sigmoid_weights_equal_the_oracle_without_gain_and_normalization(size, kept, seed, scoring, gain, mean):
    learner, reference = random_pair(size, seed)
    selection = chosen_with_weights(
        learner, reference, kept, scoring=scoring, gain=gain, normalization="mean" if mean else "sum"
    )
    scores = oracle.score_matrix(scoring, exact(learner), exact(reference))
    assert_weights_are(selection, oracle.additive_worth(scores, selection.positions.tolist()))


@given(**SIZES, scoring=SCORINGS)
def test_pairwise_weights_equal_the_oracle(size, kept, seed, scoring):
    learner, reference = random_pair_losses(size, seed=seed), random_pair_losses(size, seed=seed + 1)
    selection = chosen_with_weights(learner, reference, kept, scoring=scoring, loss="pairwise")
    scores = oracle.score_matrix(scoring, exact_losses(learner), exact_losses(reference))
    assert_weights_are(selection, oracle.additive_worth(scores, selection.positions.tolist()))


@given(**SIZES, scoring=SCORINGS)
def test_softmax_weights_equal_the_oracle(size, kept, seed, scoring):
    learner, reference = random_pair(size, seed)
    selection = chosen_with_weights(learner, reference, kept, scoring=scoring, loss="softmax")
    chosen = selection.positions.tolist()
    worth = oracle.softmax_logits(scoring, exact(learner), exact(reference), chosen)[chosen]
    if kept > 1 and size > 1:  # one row alone is worth nothing, up to rounding
        assert_weights_are(selection, worth)


@given(**SIZES)
def test_per_example_weights_are_the_differences_of_the_losses(size, kept, seed):
    learner, reference = random_example_losses(size, seed=seed), random_example_losses(size, seed=seed + 1)
    selection = chosen_with_weights(learner, reference, kept, loss="per_example")
    worth = (exact_losses(learner) - exact_losses(reference))[selection.positions.numpy()]
    assert_weights_are(selection, worth)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("tile", [(1, 1), (5, 3), (64, 7)])
def test_weights_do_not_depend_on_how_the_products_are_tiled(monkeypatch, loss, tile):
    pair = random_pair(50, seed=2)
    for kept in (10, 45):
        whole = chosen_with_weights(*pair, kept, loss=loss)
        with monkeypatch.context() as patch:
            patch.setattr("jest_core.tiles.TILE_ROWS", tile[0])
            patch.setattr("jest_core.tiles.TILE_COLUMNS", tile[1])
            tiled = chosen_with_weights(*pair, kept, loss=loss)
        assert torch.equal(tiled.positions, whole.positions)
        torch.testing.assert_close(tiled.weights, whole.weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_asking_for_weights_changes_nothing_else(loss):
    pair = random_pair(60, seed=3)
    plain = SelectionPolicy(loss=loss, sub_batch_size=20, num_chunks=4)
    expected = select_sub_batch(*pair, plain, seed=9)
    weighted = SelectionPolicy(loss=loss, sub_batch_size=20, num_chunks=4, weights=True)
    selection = select_sub_batch(*pair, weighted, seed=9)
    assert expected.weights is None
    assert torch.equal(selection.positions, expected.positions)
    assert selection.perplexity == expected.perplexity


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_rows_that_are_not_chosen_have_no_say(loss):
    learner, reference = random_pair(40, seed=4)
    selection = chosen_with_weights(learner, reference, 12, loss=loss)
    rows = selection.positions
    alone = (Embeddings(m.image[rows], m.text[rows], m.scale, m.bias) for m in (learner, reference))
    again = chosen_with_weights(*alone, 12, loss=loss)
    torch.testing.assert_close(again.weights, selection.weights[again.positions], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_weights_have_mean_one_and_none_is_negative(loss):
    weights = chosen_with_weights(*random_pair(200, seed=5), 80, loss=loss).weights
    assert float(weights.mean()) == pytest.approx(1, rel=1e-5)
    assert float(weights.min()) >= 0
    assert float(weights.std()) > 0.1


def test_a_row_that_is_worth_less_than_nothing_weighs_nothing():
    learner, reference = ExampleLosses(torch.tensor([3.0, 1.0, 0.5])), ExampleLosses(torch.ones(3))
    selection = chosen_with_weights(learner, reference, 3, loss="per_example", sampler="top_k")
    assert selection.weights.tolist() == [3, 0, 0]


def test_rows_of_which_none_is_worth_anything_weigh_the_same():
    learner, reference = ExampleLosses(torch.tensor([0.5, 0.2, 0.0])), ExampleLosses(torch.ones(3))
    assert chosen_with_weights(learner, reference, 2, loss="per_example").weights.tolist() == [1, 1]


@pytest.mark.parametrize("loss", ["sigmoid", "softmax", "pairwise", "per_example"])
def test_under_uniform_scoring_every_row_weighs_the_same(loss):
    policy = SelectionPolicy(scoring="uniform", loss=loss, sub_batch_size=6, num_chunks=2, weights=True)
    assert select_sub_batch(None, None, policy, seed=0, super_batch_size=9).weights.tolist() == [1] * 6


def test_a_scoring_without_the_learner_has_no_weights_for_it():
    with pytest.raises(ValueError, match="weights need a scoring that knows the learner's loss, not 'easy_reference'"):
        SelectionPolicy(scoring="easy_reference", filter_ratio=0.5, weights=True)


def test_a_bad_loss_between_chosen_rows_is_an_error():
    # In one chunk nothing but the diagonal is read for the choice; the weights read the rest.
    losses = PairLosses(torch.ones(4, 4))
    losses.values[1, 2] = torch.nan
    with pytest.raises(ValueError, match="pair losses must be finite"):
        chosen_with_weights(losses, random_embeddings(4, seed=0), 4, loss="pairwise")


def test_weights_that_overflow_are_an_error():
    # Matching pairs cost nothing here, so the choice goes well; mismatched ones cost more than float32 holds.
    model = Embeddings(torch.ones(4, 4), torch.ones(4, 4), scale=3e38)
    policy = SelectionPolicy(scoring="hard_learner", sub_batch_size=3, num_chunks=1, weights=True)
    with pytest.raises(ValueError, match="overflow float32"):
        select_sub_batch(model, None, policy, seed=0)


@pytest.mark.parametrize("kind", ["embeddings", "losses"])
def test_a_selection_tells_the_mean_own_score_of_what_it_chose_and_dropped(kind):
    if kind == "losses":
        learner, reference = random_example_losses(30, seed=1), random_example_losses(30, seed=2)
        policy = SelectionPolicy(sub_batch_size=7, num_chunks=2, loss="per_example")
        own = learner.values.double() - reference.values.double()
    else:
        learner, reference = random_pair(30, seed=3)
        policy = SelectionPolicy(sub_batch_size=7, num_chunks=2)
        own = torch.from_numpy(oracle.score_matrix("learnability", exact(learner), exact(reference))).diagonal()
    selection = select_sub_batch(learner, reference, policy, seed=4)
    dropped = [row for row in range(30) if row not in selection.positions.tolist()]
    expected = (float(own[selection.positions].mean()), float(own[dropped].mean()))
    assert selection.mean_own_scores == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_where_no_row_is_dropped_there_is_no_mean_of_dropped_rows():
    selection = select_sub_batch(*random_pair(4, seed=3), SelectionPolicy(sub_batch_size=4, num_chunks=1), seed=4)
    assert np.isnan(selection.mean_own_scores[1])
