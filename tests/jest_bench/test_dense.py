"""The rivals of the benchmark choose what the selection chooses: none of them is faster by doing something else."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from jest_bench.dense import LARGEST_EXPONENT, select_with_numpy, select_with_torch
from jest_bench.problem import super_batch
from jest_core import SelectionPolicy, select_sub_batch
from jest_core.joint import chunk_boundaries

BOUNDARIES = chunk_boundaries(30, 5)
POLICY = SelectionPolicy(sub_batch_size=30, num_chunks=5, sampler="top_k")


@pytest.mark.parametrize("select", [select_with_numpy, select_with_torch])
def test_without_noise_a_dense_selection_takes_the_same_rows_in_the_same_chunks(select):
    batch = super_batch(150, 24)
    expected = select_sub_batch(batch.learner, batch.reference, POLICY, seed=0).positions.tolist()
    dense = select(batch.learner, batch.reference, BOUNDARIES, None).tolist()
    for start, stop in pairwise(BOUNDARIES):
        assert set(dense[start:stop]) == set(expected[start:stop])


@pytest.mark.parametrize("select", [select_with_numpy, select_with_torch])
def test_logits_at_which_exp_overflows_are_no_trouble(select):
    batch = super_batch(150, 24)
    learner, reference = (replace(model, scale=250.0, bias=-110.0) for model in (batch.learner, batch.reference))
    independent = SelectionPolicy(sub_batch_size=5, num_chunks=1, sampler="top_k")
    expected = select_sub_batch(learner, reference, independent, seed=0).positions.tolist()
    largest = torch.max(learner.scale * learner.image @ learner.text.T + learner.bias)
    assert largest > LARGEST_EXPONENT
    assert set(select(learner, reference, (0, 5), None).tolist()) == set(expected)


def test_with_noise_a_dense_selection_takes_distinct_rows_and_others_each_time():
    batch = super_batch(150, 24)
    for select, generator in (
        (select_with_numpy, np.random.default_rng(0)),
        (select_with_torch, torch.Generator().manual_seed(0)),
    ):
        draws = [select(batch.learner, batch.reference, BOUNDARIES, generator).tolist() for _ in range(2)]
        assert all(len(set(draw)) == 30 for draw in draws)
        assert set(draws[0]) != set(draws[1])
