"""The cost model: counted by hand on small loads, and compared with what the parts themselves say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from jest_core import SelectionPolicy, select_sub_batch
from jest_core_samples import random_pair
from jest_server.cli.app import app
from jest_server.cli.sizing import Load, needs_of
from jest_server.domain.embedding_codec import CODECS

SMALL = Load(
    jobs=4,
    data_sets=2,
    sub_batch=20,
    filter_ratio=0.8,
    num_chunks=4,
    width=8,
    steps_per_s=3.0,
    examples=7200,
    cached=0.5,
    feature_bytes=10,
    reference_examples_per_s=100.0,
    selector_flops=1e6,
)


def test_a_small_load_counted_by_hand():
    needs = needs_of(SMALL)
    assert needs.super_batch == 100
    assert needs.learner_bytes_per_step == 100 * (8 + 8) * 2
    assert needs.upload_bytes_per_step == 50 * 10
    assert needs.reference_bytes_per_step == 100 * 32
    assert needs.inferences_per_s == 2 * 3 * 50
    assert needs.triton_replicas == math.ceil(300 / 70)
    assert needs.replica_hours_per_data_set == 7200 / 100 / 3600
    assert needs.cache_bytes == 2 * 7200 * (32 + 130)
    assert needs.select_s == pytest.approx(8 * 100 * 20 * 8 * 0.75 / 1e6)
    assert needs.selectors == math.ceil(4 * 3 * needs.select_s / 0.7)


def test_bytes_are_those_of_the_cache():
    for precision, codec in CODECS.items():
        row = np.ones((2, 8), np.float16).tobytes()
        [value] = codec.encode([row], 8)
        assert needs_of(replace(SMALL, precision=precision)).reference_bytes_per_step == 100 * len(value)


@pytest.mark.parametrize(("rows", "chunks"), [(1000, 4), (2000, 10)])
def test_the_products_are_those_of_a_selection(rows, chunks):
    learner, reference = random_pair(rows, seed=1)
    policy = SelectionPolicy(filter_ratio=0.8, num_chunks=chunks)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what other threads do is not counted
    try:
        with FlopCounterMode(display=False) as counter:
            select_sub_batch(learner, reference, policy, seed=1)
    finally:
        torch.set_num_threads(threads)
    width = (learner.image.shape[1] + reference.image.shape[1]) // 2
    load = Load(sub_batch=rows // 5, filter_ratio=0.8, num_chunks=chunks, width=width, selector_flops=1)
    assert counter.get_total_flops() == pytest.approx(needs_of(load).select_s)


@given(jobs=st.integers(1, 100), sets=st.integers(1, 100))
def test_jobs_over_the_same_data_cost_the_reference_model_nothing_more(jobs, sets):
    load = Load(jobs=jobs, data_sets=min(jobs, sets))
    more = replace(load, jobs=2 * jobs)
    assert needs_of(more).triton_replicas == needs_of(load).triton_replicas
    assert needs_of(more).cache_bytes == needs_of(load).cache_bytes
    assert needs_of(more).selectors >= needs_of(load).selectors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jobs": 0}, "jobs is 0, expected more than 0"),
        ({"data_sets": 5}, "data_sets is 5, expected at most the number of jobs, 4"),
        ({"filter_ratio": 1.0}, "filter_ratio is 1.0, expected a share"),
        ({"cached": 1.5}, "cached is 1.5, expected a share"),
        ({"steps_per_s": math.nan}, "steps_per_s is nan"),
        ({"selector_flops": math.inf}, "selector_flops is inf"),
        ({"feature_bytes": -1}, "feature_bytes is -1, expected at least 0"),
        ({"precision": "int4"}, "precision is 'int4', expected one of float16, int8"),
    ],
)
def test_a_load_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_the_command_prints_a_row_for_each_number_of_jobs():
    done = CliRunner().invoke(app, ["size", "--jobs", "1,10"])
    assert done.exit_code == 0
    head, _, *rows = done.output.strip().splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 10"]
    assert {row.count("|") for row in rows} == {head.count("|")}
    refused = CliRunner().invoke(app, ["size", "--jobs", "1", "--cached", "2"])
    assert refused.exit_code == 2
    assert "cached is 2.0" in refused.output
