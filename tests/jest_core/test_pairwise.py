"""Losses that a caller brings as a matrix: the engine must read it as the sum over pairs that it is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import jest_core_oracle as oracle
from jest_core import PairLosses, SelectionPolicy, conditional_logits, select_sub_batch
from jest_core_samples import exact, exact_losses, random_embeddings, random_pair, random_pair_losses

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
POLICY = SelectionPolicy(loss="pairwise", sub_batch_size=12, num_chunks=4)
BOTH_DIRECTIONS = pytest.mark.parametrize("transposed", [False, True])


@given(
    data=st.data(),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    scoring=st.sampled_from(list(oracle.SIGNS)),
    mean=st.booleans(),
    reference_kind=st.sampled_from(["losses", "embeddings"]),
)
def test_logits_equal_the_oracle(data, size, seed, scoring, mean, reference_kind):
    learner = random_pair_losses(size, seed=seed, dtype=data.draw(DTYPES))
    if reference_kind == "losses":
        reference = random_pair_losses(size, seed=seed + 1, dtype=data.draw(DTYPES))
        scores = oracle.score_matrix(scoring, exact_losses(learner), exact_losses(reference))
    else:
        reference = random_embeddings(size, seed=seed + 1)
        scores = oracle.score_matrix(scoring, exact_losses(learner), exact(reference))
    chosen = data.draw(st.lists(st.integers(0, size - 1), unique=True))
    normalization = "mean" if mean else "sum"
    policy = SelectionPolicy(
        loss="pairwise", scoring=scoring, filter_ratio=0, num_chunks=1, normalization=normalization
    )
    logits = conditional_logits(learner, reference, policy, chosen)
    expected = oracle.conditional_logits(scores, chosen, mean=mean)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5, atol=1e-5 * (1 + len(chosen)))


@pytest.mark.parametrize("sampler", ["gumbel", "top_k"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_sigmoid_losses_of_embeddings_select_what_the_embeddings_select(sampler, seed):
    learner, reference = random_pair(80, seed)
    matrices = [PairLosses(torch.from_numpy(oracle.pair_losses(exact(m))).float()) for m in (learner, reference)]
    by_sigmoid = SelectionPolicy(filter_ratio=0.7, num_chunks=6, sampler=sampler)
    by_matrix = SelectionPolicy(filter_ratio=0.7, num_chunks=6, sampler=sampler, loss="pairwise")
    expected = select_sub_batch(learner, reference, by_sigmoid, seed=seed)
    for given_reference in (matrices[1], reference):
        selection = select_sub_batch(matrices[0], given_reference, by_matrix, seed=seed)
        assert torch.equal(selection.positions, expected.positions)
        assert selection.perplexity == pytest.approx(expected.perplexity, rel=1e-3)


@pytest.mark.parametrize("rows", [1, 5, 7])
def test_few_rows_left_to_choose_from_are_read_as_well_as_many(monkeypatch, rows):
    # With most rows gone, tiles are lists of rows and no longer ranges of them; some are as long as a chunk.
    monkeypatch.setattr("jest_core.tiles.TILE_ROWS", rows)
    losses = random_pair_losses(30, seed=4)
    scores = exact_losses(losses)
    policy = SelectionPolicy(loss="pairwise", scoring="hard_learner", sub_batch_size=30, num_chunks=6)
    positions = select_sub_batch(losses, None, policy, seed=4).positions.tolist()
    for regret in oracle.regrets(
        positions, 6, lambda chosen: oracle.conditional_logits(scores, chosen), oracle.Rules.for_rows(30), 4
    ):
        assert regret < 1e-4


@BOTH_DIRECTIONS
def test_a_memory_mapped_matrix_selects_what_it_selects_in_memory(tmp_path, transposed):
    losses = random_pair_losses(60, seed=5)
    stored = tmp_path / "losses.bin"
    (losses.values.T if transposed else losses.values).contiguous().numpy().tofile(stored)
    mapped = torch.from_file(str(stored), size=60 * 60, dtype=torch.float32).view(60, 60)
    mapped = PairLosses(mapped.T if transposed else mapped)
    reference = random_embeddings(60, seed=6)
    expected = select_sub_batch(losses, reference, POLICY, seed=0)
    assert torch.equal(select_sub_batch(mapped, reference, POLICY, seed=0).positions, expected.positions)


def test_the_matrix_is_left_as_it_was():
    losses = random_pair_losses(40, seed=7)
    before = losses.values.clone()
    select_sub_batch(losses, random_pair_losses(40, seed=8), POLICY, seed=0)
    assert torch.equal(losses.values, before)


def test_a_learner_that_is_its_own_reference_is_sampled_uniformly():
    losses = random_pair_losses(20, seed=9)
    selection = select_sub_batch(losses, losses, POLICY, seed=0)
    assert selection.perplexity == pytest.approx([20, 17, 14, 11])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_loss_on_the_diagonal_is_an_error(value):
    losses = random_pair_losses(20, seed=10)
    losses.values[3, 3] = value
    with pytest.raises(ValueError, match="pair losses must be finite: the matrix holds NaN, Inf"):
        select_sub_batch(losses, random_embeddings(20, seed=1), POLICY, seed=0)


@BOTH_DIRECTIONS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_loss_off_the_diagonal_is_an_error_once_it_is_read(transposed, value):
    losses = random_pair_losses(20, seed=11)
    (losses.values.T if transposed else losses.values)[3, 4] = value
    for chosen in ([4], [3, 9]):
        with pytest.raises(ValueError, match="pair losses must be finite"):
            conditional_logits(losses, random_embeddings(20, seed=1), POLICY, chosen)
    assert conditional_logits(losses, random_embeddings(20, seed=1), POLICY, [5]).isfinite().all()


@pytest.mark.parametrize(
    ("learner", "reference", "message"),
    [
        (
            random_embeddings(20, seed=0),
            None,
            "learner must bring its pair losses under loss 'pairwise', not Embeddings",
        ),
        (None, random_embeddings(20, seed=0), "learner is None, but scoring 'learnability' needs its pair losses"),
        (
            random_pair_losses(20, seed=0),
            None,
            "reference is None, but scoring 'learnability' needs its embeddings or pair losses",
        ),
        (
            random_pair_losses(20, seed=0),
            random_embeddings(21, seed=0),
            r"the number of rows must be the same everywhere: learner \(20\), reference \(21\)",
        ),
    ],
)
def test_outputs_that_do_not_fit_the_loss_are_an_error(learner, reference, message):
    with pytest.raises(ValueError, match=message):
        select_sub_batch(learner, reference, POLICY, seed=0)
