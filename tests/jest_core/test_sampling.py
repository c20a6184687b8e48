from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jest_core_oracle as oracle
from jest_core.sampling import CandidatePool, order_by_gumbel, order_by_logit, perplexity, rank_quotas
from jest_core_statistics import fit


def pool_of(keys: list[int], ranks: list[int]) -> CandidatePool:
    return CandidatePool(torch.tensor(keys), max(keys) + 1, torch.tensor(ranks), max(ranks) + 1)


@st.composite
def walks(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[int]]:
    size, world_size = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    keys = draw(st.lists(st.integers(0, draw(st.integers(0, size))), min_size=size, max_size=size))
    ranks = draw(st.lists(st.integers(0, world_size - 1), min_size=size, max_size=size))
    quotas = draw(st.lists(st.integers(0, 6), min_size=world_size, max_size=world_size))
    return draw(st.permutations(range(size))), quotas, ranks, keys


@settings(max_examples=400)
@given(walks())
def test_taking_all_at_once_equals_walking_row_by_row(case):
    order, quotas, ranks, keys = case
    pool = CandidatePool(torch.tensor(keys), max(keys) + 1, torch.tensor(ranks), len(quotas))
    expected = oracle.walk(order, quotas, oracle.Rules.for_rows(len(keys), ranks=ranks, keys=keys))
    if expected is None:
        with pytest.raises(ValueError, match=r"rank \d has \d+ distinct example keys to choose from, but needs \d"):
            pool.take(torch.tensor(order), quotas)
    else:
        assert pool.take(torch.tensor(order), quotas).tolist() == expected


def test_a_chain_of_duplicates_across_ranks_is_followed_to_its_end():
    # Every row that rank 0 loses makes it claim the next, which rank 1 holds a better copy of.
    keys = [0, 0, 1, 1, 2, 2, 3, 3, 4]
    ranks = [1, 0, 1, 0, 1, 0, 1, 0, 0]
    assert pool_of(keys, ranks).take(torch.arange(9), [1, 4]).tolist() == [0, 2, 4, 6, 8]


def test_taken_rows_and_their_duplicates_are_gone():
    pool = pool_of([0, 1, 0, 2, 1], [0, 0, 0, 0, 0])
    assert pool.take(torch.tensor([2, 4, 3, 1, 0]), [2]).tolist() == [2, 4]
    assert pool.rows().tolist() == [3]


def test_a_rank_that_runs_out_of_examples_is_named():
    pool = pool_of([0, 1, 0, 1, 2], [0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="rank 1 has 1 distinct example keys to choose from, but needs 2"):
        pool.take(torch.arange(5), [2, 2])


@given(boundaries=st.lists(st.integers(0, 60), min_size=2, unique=True), world_size=st.integers(1, 9))
def test_quotas_deal_rows_to_ranks_in_turn(boundaries, world_size):
    start, stop = sorted(boundaries)[:2]
    assert rank_quotas(start, stop, world_size) == oracle.rank_quotas(start, stop, world_size)


def test_gumbel_order_has_the_law_of_sampling_one_by_one_from_the_softmax():
    logits = torch.tensor([0.0, 1.5, -1.0, 0.7])
    rows = torch.arange(4)
    draws = Counter(tuple(order_by_gumbel(logits, rows, seed=seed, chunk=0)[:2].tolist()) for seed in range(6000))
    law = oracle.draw_law(logits.double().numpy(), range(4), 2)
    assert fit(draws, law) > 0.01
    flat = oracle.draw_law(np.zeros(4), range(4), 2)
    assert fit(draws, flat) < 1e-9


def test_noise_belongs_to_rows_and_not_to_places():
    logits = torch.linspace(-1, 1, 10)
    rows = torch.arange(10)
    order = order_by_gumbel(logits, rows, seed=9, chunk=4)
    fewer = torch.tensor([1, 4, 7, 9])
    expected = [row for row in order.tolist() if row in fewer.tolist()]
    assert order_by_gumbel(logits[fewer], fewer, seed=9, chunk=4).tolist() == expected


def test_noise_decides_between_logits_too_large_for_float32_to_add_it():
    # At 1e9 float32 has steps of 64: adding the noise in float32 would leave ties in order of position.
    logits = torch.full((50,), 1e9)
    first = {int(order_by_gumbel(logits, torch.arange(50), seed=seed, chunk=0)[0]) for seed in range(40)}
    assert len(first) > 10


def test_equal_logits_keep_the_order_of_their_rows():
    rows = torch.arange(2000)
    assert torch.equal(order_by_logit(torch.zeros(2000), rows), rows)
    assert order_by_logit(torch.tensor([1.0, 2.0, 1.0, 2.0]), torch.arange(4)).tolist() == [1, 3, 0, 2]


@given(logits=st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=30))
def test_perplexity_equals_the_oracle(logits):
    value = float(perplexity(torch.tensor(logits)))
    assert value == pytest.approx(oracle.perplexity(np.array(logits)), rel=1e-9)
    assert 1 - 1e-9 <= value <= len(logits) * (1 + 1e-9)
