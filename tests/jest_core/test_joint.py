import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import jest_core_oracle as oracle
from jest_core import SelectionPolicy, conditional_logits, select_sub_batch
from jest_core.counter_rng import gumbel_noise
from jest_core_samples import exact, random_embeddings, random_pair

SEEDS = st.integers(0, 2**64 - 1)
LOSSES = st.sampled_from(["sigmoid", "softmax"])


@given(data=st.data(), size=st.integers(1, 60), percent=st.integers(0, 99), seed=SEEDS)
def test_a_selection_is_exactly_b_distinct_rows_cut_into_even_chunks(data, size, percent, seed):
    b = size * (100 - percent) // 100
    assume(b >= 1)
    num_chunks = data.draw(st.integers(1, b))
    policy = SelectionPolicy(filter_ratio=percent / 100, num_chunks=num_chunks)
    selection = select_sub_batch(*random_pair(size, seed % 100), policy, seed=seed)
    assert selection.positions.dtype == torch.int64
    assert len(set(selection.positions.tolist())) == len(selection.positions) == b
    assert set(selection.positions.tolist()) <= set(range(size))
    assert np.diff(selection.chunk_boundaries).tolist() == oracle.chunk_sizes(b, num_chunks)
    assert max(oracle.chunk_sizes(b, num_chunks)) - min(oracle.chunk_sizes(b, num_chunks)) <= 1
    assert len(selection.perplexity) == num_chunks


@given(data=st.data(), world_size=st.integers(1, 6), share=st.integers(1, 6), seed=SEEDS)
def test_every_rank_gives_its_share_and_stays_even_after_every_chunk(data, world_size, share, seed):
    b = world_size * share
    ranks = data.draw(st.permutations([rank for rank in range(world_size) for _ in range(share + rank)]))
    policy = SelectionPolicy(sub_batch_size=b, num_chunks=data.draw(st.integers(1, b)))
    rank_of_row = torch.tensor(ranks)
    selection = select_sub_batch(*random_pair(len(ranks), 5), policy, seed=seed, rank_of_row=rank_of_row)
    chosen_ranks = rank_of_row[selection.positions]
    for stop in selection.chunk_boundaries:
        held = torch.bincount(chosen_ranks[:stop], minlength=world_size).tolist()
        assert held == oracle.rank_holdings(stop, world_size)


def test_global_placement_does_not_care_where_rows_are():
    pair = random_pair(40, seed=3)
    policy = SelectionPolicy(sub_batch_size=10, num_chunks=3, placement="global")
    ranks = torch.arange(40) % 4
    selection = select_sub_batch(*pair, policy, seed=1, rank_of_row=ranks)
    assert torch.equal(selection.positions, select_sub_batch(*pair, policy, seed=1).positions)


@given(
    seed=SEEDS,
    data_seed=st.integers(0, 1000),
    loss=LOSSES,
    scoring=st.sampled_from(["learnability", "easy_reference", "hard_learner"]),
    mean=st.booleans(),
    num_chunks=st.integers(1, 8),
)
def test_growing_chunk_by_chunk_equals_scoring_afresh_for_every_chunk(seed, data_seed, loss, scoring, mean, num_chunks):
    learner, reference = random_pair(30, data_seed)
    normalization = "mean" if mean else "sum"
    policy = SelectionPolicy(
        loss=loss, scoring=scoring, sub_batch_size=17, num_chunks=num_chunks, normalization=normalization
    )
    chosen: list[int] = []
    for chunk, count in enumerate(oracle.chunk_sizes(17, num_chunks)):
        noisy = conditional_logits(learner, reference, policy, chosen).double() + gumbel_noise(
            seed, torch.arange(30), chunk
        )
        noisy[chosen] = -torch.inf
        values, order = noisy.sort(descending=True)
        assume(float(-values[: 30 - len(chosen)].diff().max()) > 1e-3)
        chosen += order[:count].tolist()
    assert select_sub_batch(learner, reference, policy, seed=seed).positions.tolist() == chosen


@given(loss=LOSSES, data_seed=st.integers(0, 1000), num_chunks=st.integers(1, 8), gain=st.sampled_from([0.2, 1.0, 3.0]))
def test_top_k_is_the_oracles_greedy_selection(loss, data_seed, num_chunks, gain):
    learner, reference = random_pair(30, data_seed)
    models = exact(learner), exact(reference)
    scores = oracle.score_matrix("learnability", *models)
    chosen: list[int] = []
    perplexities = []
    for count in oracle.chunk_sizes(17, num_chunks):
        if loss == "softmax":
            logits = oracle.softmax_logits("learnability", *models, chosen, gain=gain)
        else:
            logits = oracle.conditional_logits(scores, chosen, gain=gain)
        left = np.setdiff1d(np.arange(30), chosen)
        perplexities.append(oracle.perplexity(logits[left]))
        order = left[np.argsort(-logits[left])]
        assume(np.min(-np.diff(logits[order])) > 1e-4 * gain * (1 if loss == "softmax" else 10))
        chosen += order[:count].tolist()
    policy = SelectionPolicy(loss=loss, sub_batch_size=17, num_chunks=num_chunks, gain=gain, sampler="top_k")
    selection = select_sub_batch(learner, reference, policy, seed=0)
    assert selection.positions.tolist() == chosen
    assert selection.perplexity == pytest.approx(perplexities, rel=1e-3)


def test_one_chunk_is_independent_selection():
    learner, reference = random_pair(50, seed=2)
    scores = oracle.score_matrix("learnability", exact(learner), exact(reference))
    noisy = np.diag(scores) + gumbel_noise(77, torch.arange(50), 0).numpy()
    selection = select_sub_batch(learner, reference, SelectionPolicy(sub_batch_size=20, num_chunks=1), seed=77)
    assert selection.positions.tolist() == np.argsort(-noisy)[:20].tolist()


@given(data=st.data(), seed=SEEDS, num_chunks=st.integers(1, 6))
def test_at_most_one_row_of_an_example_is_chosen(data, seed, num_chunks):
    keys = data.draw(st.lists(st.text(max_size=1), min_size=8, max_size=40).filter(lambda k: len(set(k)) >= 6))
    policy = SelectionPolicy(sub_batch_size=6, num_chunks=num_chunks)
    selection = select_sub_batch(*random_pair(len(keys), 1), policy, seed=seed, example_keys=keys)
    assert len({keys[row] for row in selection.positions.tolist()}) == 6


def test_keys_mean_the_same_as_text_and_as_numbers():
    numbers = torch.tensor([7, -3, 7, 10**12, 5, -3, 8, 9, 10, 5])
    texts = [str(number) for number in numbers.tolist()]
    policy = SelectionPolicy(sub_batch_size=6, num_chunks=2)
    pair = random_pair(10, seed=0)
    by_number = select_sub_batch(*pair, policy, seed=4, example_keys=numbers)
    assert torch.equal(by_number.positions, select_sub_batch(*pair, policy, seed=4, example_keys=texts).positions)


def test_perplexity_counts_only_rows_that_can_still_be_chosen():
    policy = SelectionPolicy(scoring="uniform", sub_batch_size=4, num_chunks=2)
    keys = ["a", "a", "b", "b", "c", "c", "d", "d"]
    selection = select_sub_batch(None, None, policy, seed=0, example_keys=keys, super_batch_size=8)
    assert selection.perplexity == pytest.approx((8.0, 4.0))


@pytest.mark.parametrize(
    ("scoring", "learner_needed", "reference_needed"),
    [("easy_reference", False, True), ("hard_learner", True, False), ("uniform", False, False)],
)
def test_embeddings_that_the_scoring_does_not_need_change_nothing(scoring, learner_needed, reference_needed):
    learner, reference = random_pair(30, seed=6)
    policy = SelectionPolicy(scoring=scoring, sub_batch_size=9, num_chunks=3)
    full = select_sub_batch(learner, reference, policy, seed=1)
    bare = select_sub_batch(
        learner if learner_needed else None,
        reference if reference_needed else None,
        policy,
        seed=1,
        super_batch_size=30,
    )
    assert torch.equal(full.positions, bare.positions)


def test_a_hard_learner_and_an_easy_reference_choose_what_their_names_say():
    model = random_embeddings(40, seed=9)
    losses = np.diag(oracle.pair_losses(exact(model)))
    for scoring, expected in (("hard_learner", np.argsort(-losses)[:5]), ("easy_reference", np.argsort(losses)[:5])):
        policy = SelectionPolicy(scoring=scoring, sub_batch_size=5, num_chunks=1, sampler="top_k")
        assert select_sub_batch(model, model, policy, seed=0).positions.tolist() == expected.tolist()


def test_mean_normalization_keeps_the_sampler_from_turning_greedy():
    pair = random_pair(400, seed=10)
    perplexities = {
        normalization: select_sub_batch(
            *pair, SelectionPolicy(filter_ratio=0.5, num_chunks=8, normalization=normalization), seed=0
        ).perplexity
        for normalization in ("sum", "mean")
    }
    assert perplexities["sum"][-1] < 40
    assert perplexities["mean"][-1] > 150


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_chooses_what_the_cpu_chooses():
    learner, reference = random_pair(300, seed=11)
    policy = SelectionPolicy(filter_ratio=0.8, num_chunks=6)
    on_gpu = select_sub_batch(learner.to("cuda"), reference.to("cuda"), policy, seed=5)
    assert torch.equal(on_gpu.positions, select_sub_batch(learner, reference, policy, seed=5).positions)
