"""What holds for every selection from embeddings, at sizes that nobody would choose: primes, one row, all rows but one.

Choices are checked one by one: no row that was allowed may be better, noise included, than the row that was taken, by
more than rounding. Where the gaps between rows are larger than that, this is equality with the oracle's selection.
"""

import random
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import jest_core_oracle as oracle
from jest_core import Embeddings, Selection, SelectionPolicy, select_sub_batch
from jest_core_samples import exact, random_embeddings

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    learner: Embeddings
    reference: Embeddings
    policy: SelectionPolicy
    ranks: list[int]
    sub_batch_size: int
    seed: int

    def select(self) -> Selection:
        return select_sub_batch(
            self.learner, self.reference, self.policy, seed=self.seed, rank_of_row=torch.tensor(self.ranks)
        )

    def logits(self, chosen: list[int]) -> np.ndarray:
        policy, models = self.policy, (exact(self.learner), exact(self.reference))
        if policy.loss == "softmax":
            return oracle.softmax_logits(policy.scoring, *models, chosen, gain=policy.gain)
        scores = oracle.score_matrix(policy.scoring, *models)
        return oracle.conditional_logits(scores, chosen, gain=policy.gain, mean=policy.normalization == "mean")

    @property
    def rules(self) -> oracle.Rules:
        if self.policy.placement == "global":
            return oracle.Rules.for_rows(len(self.ranks))
        return oracle.Rules.for_rows(len(self.ranks), ranks=self.ranks)

    def regrets(self, selection: Selection) -> list[float]:
        return list(
            oracle.regrets(
                selection.positions.tolist(),
                self.policy.num_chunks,
                self.logits,
                self.rules,
                self.seed if self.policy.sampler == "gumbel" else None,
            )
        )

    @property
    def rounding(self) -> float:
        """By how much two rows' logits may come too close or too far, with unit rows in all models."""
        models = (self.learner, self.reference)
        of_pair = sum(1e-5 * (1 + model.scale + abs(model.bias)) for model in models)
        if self.policy.precision == "bfloat16":
            # Half a unit in the eighth bit: of each factor, and of the product.
            of_pair += sum(3 * 2**-8 * model.scale for model in models)
        is_sum = self.policy.loss == "sigmoid" and self.policy.normalization == "sum"
        return 2 * self.policy.gain * of_pair * (1 + 2 * self.sub_batch_size if is_sum else 1)


@st.composite
def models(draw: st.DrawFn, size: int) -> Embeddings:
    return random_embeddings(
        size,
        seed=draw(st.integers(0, 2**32)),
        width=draw(st.integers(1, 9)),
        scale=draw(st.floats(0.5, 100)),
        bias=draw(st.floats(-10, 10)),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    )


@st.composite
def cases(draw: st.DrawFn, **fixed: object) -> Case:
    size = draw(st.integers(1, 70) | st.sampled_from([1, 2, 3, 61, 67, 70]))
    percent = draw(st.integers(0, 100 - -(-100 // size)) | st.sampled_from([0, 100 - -(-100 // size)]))
    b = size * (100 - percent) // 100
    placement = draw(st.sampled_from(["per_rank", "global"]))
    world_size = draw(st.sampled_from([w for w in range(1, 8) if w <= size and (placement == "global" or b % w == 0)]))
    dealt = [row % world_size for row in range(max(b, world_size))]
    shuffler = random.Random(draw(st.integers(0, 1000)))
    ranks = dealt + [shuffler.randrange(world_size) for _ in range(size - len(dealt))]
    shuffler.shuffle(ranks)
    policy = {
        "loss": draw(st.sampled_from(["sigmoid", "softmax"])),
        "scoring": draw(st.sampled_from(list(oracle.SIGNS))),
        "sampler": draw(st.sampled_from(["gumbel", "top_k"])),
        "normalization": draw(st.sampled_from(["sum", "mean"])),
        "precision": draw(st.sampled_from(["float32", "bfloat16"])),
        "gain": draw(st.sampled_from([0.0, 0.05, 1.0, 3.0])),
        "num_chunks": draw(st.integers(1, b) | st.sampled_from([1, b])),
        **fixed,
    }
    return Case(
        learner=draw(models(size)),
        reference=draw(models(size)),
        policy=SelectionPolicy(filter_ratio=percent / 100, placement=placement, **policy),
        ranks=ranks,
        sub_batch_size=b,
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@given(case=cases())
def test_it_is_exactly_b_distinct_rows_cut_into_even_chunks(case):
    selection = case.select()
    positions = selection.positions.tolist()
    assert len(set(positions)) == len(positions) == case.sub_batch_size
    assert set(positions) <= set(range(len(case.ranks)))
    assert list(selection.chunk_boundaries) == oracle.boundaries(case.sub_batch_size, case.policy.num_chunks)


@given(case=cases())
def test_ranks_stay_even_after_every_chunk(case):
    selection = case.select()
    ranks = case.rules.ranks
    for start, stop in pairwise(selection.chunk_boundaries):
        given_by = [ranks[row] for row in selection.positions[start:stop].tolist()]
        expected = case.rules.quotas(start, stop)
        assert [given_by.count(rank) for rank in range(len(expected))] == expected


@given(case=cases())
def test_the_perplexity_is_a_number_of_candidates(case):
    selection = case.select()
    assert len(selection.perplexity) == case.policy.num_chunks
    for start, perplexity in zip(selection.chunk_boundaries[:-1], selection.perplexity, strict=True):
        assert 1 - 1e-9 <= perplexity <= (len(case.ranks) - start) * (1 + 1e-9)


@given(case=cases(precision="float32"))
def test_every_row_taken_was_the_best_one_allowed(case):
    assert max(case.regrets(case.select())) <= case.rounding


@given(case=cases(precision="bfloat16"))
def test_under_bfloat16_every_row_taken_was_as_good_as_the_best_one(case):
    assert max(case.regrets(case.select())) <= case.rounding


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_the_check_would_notice_a_choice_that_is_nearly_as_good(loss):
    case = Case(
        learner=random_embeddings(40, seed=1),
        reference=random_embeddings(40, seed=2),
        policy=SelectionPolicy(loss=loss, sub_batch_size=20, num_chunks=4),
        ranks=[0] * 40,
        sub_batch_size=20,
        seed=3,
    )
    swapped = case.select()
    assert max(case.regrets(swapped)) <= case.rounding
    swapped.positions[[8, 9]] = swapped.positions[[9, 8]]
    assert max(case.regrets(swapped)) > case.rounding
