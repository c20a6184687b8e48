"""Selection as the batch sampler of a DataLoader: what is loaded, and in which order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, SequentialSampler

import jest_trainer as jest

ROWS, SUPER_BATCH = 32, 8
LOSSES = torch.arange(ROWS) % 5 / 5.0
"""Each example's loss in an earlier epoch."""


class Pictures(Dataset):
    """A dataset that remembers what was loaded of it."""

    def __init__(self):
        self.loaded = []

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        self.loaded.append(index)
        return index


def most_lost(indices):
    """The quarter with the largest losses, in order of choice."""
    return sorted(indices, key=lambda index: -LOSSES[index])[: SUPER_BATCH // 4]


@pytest.fixture
def job(client):
    policy = jest.SelectionPolicy(filter_ratio=0.75, num_chunks=2, loss="per_example", scoring="hard_learner")
    return client.create_job("run-1", policy=policy)


@pytest.fixture
def loop_over(job):
    """Makes a loop over lists of indices, or over dictionaries with a column of them."""

    def make(super_batches, indices=lambda batch: batch):
        return jest.SelectedBatches(
            job, super_batches, keys=indices, embed=lambda batch: jest.ExampleLosses(learner=LOSSES[indices(batch)])
        )

    return make


@pytest.fixture
def dataset():
    return Pictures()


def test_a_data_loader_loads_the_chosen_rows_and_no_others(loop_over, dataset):
    super_batches = BatchSampler(SequentialSampler(dataset), SUPER_BATCH, drop_last=True)
    loader = DataLoader(dataset, batch_sampler=jest.SelectedIndices(loop_over(super_batches)))
    batches = [batch.tolist() for batch in loader]
    assert batches == [most_lost(indices) for indices in super_batches]
    assert dataset.loaded == [index for batch in batches for index in batch]
    assert len(loader) == len(batches) == ROWS // SUPER_BATCH


@pytest.mark.parametrize("column", [torch.tensor, np.array, list, tuple])
def test_super_batches_of_smaller_examples_name_the_indices_of_the_full_ones(loop_over, dataset, column):
    super_batches = [
        {"index": column(list(range(first, first + SUPER_BATCH))), "small": torch.zeros(SUPER_BATCH, 1)}
        for first in range(0, ROWS, SUPER_BATCH)
    ]
    loop = loop_over(super_batches, indices=lambda batch: [int(index) for index in batch["index"]])
    loader = DataLoader(dataset, batch_sampler=jest.SelectedIndices(loop, indices=lambda batch: batch["index"]))
    expected = [most_lost(range(first, first + SUPER_BATCH)) for first in range(0, ROWS, SUPER_BATCH)]
    assert [batch.tolist() for batch in loader] == expected
    assert dataset.loaded == [index for indices in expected for index in indices]


def test_epochs_reach_the_sampler_below(loop_over, dataset):
    shuffled = DistributedSampler(dataset, num_replicas=1, rank=0)
    indices = jest.SelectedIndices(loop_over(BatchSampler(shuffled, SUPER_BATCH, drop_last=True)))
    assert indices.sampler is shuffled
    assert indices.batch_size == SUPER_BATCH // 4
    loader = DataLoader(dataset, batch_sampler=indices)
    orders = []
    for epoch in (0, 1, 0):
        loader.batch_sampler.set_epoch(epoch)
        orders.append([batch.tolist() for batch in loader])
    assert orders[0] == orders[2] != orders[1]


def test_a_data_loader_that_is_left_early_leaves_nothing_running(loop_over, dataset):
    super_batches = BatchSampler(SequentialSampler(dataset), SUPER_BATCH, drop_last=True)
    for _ in DataLoader(dataset, batch_sampler=jest.SelectedIndices(loop_over(super_batches))):
        break  # the tests' own fixture waits for the loop's thread to end
    assert len(dataset.loaded) == SUPER_BATCH // 4


@pytest.mark.parametrize("loop", [[[1, 2]], None])
def test_anything_but_a_loop_is_refused(loop):
    with pytest.raises(ValueError, match=r"loop must be a SelectedBatches, not (list|NoneType)"):
        jest.SelectedIndices(loop)


def test_decided_batches_are_refused(loop_over):
    with pytest.raises(ValueError, match="loop must be a SelectedBatches, not DecidedBatches"):
        jest.SelectedIndices(loop_over([]).with_decisions())


def test_indices_that_are_no_function_are_refused(loop_over):
    with pytest.raises(ValueError, match="indices must be a function of a sub-batch or None, not str"):
        jest.SelectedIndices(loop_over([]), indices="index")


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (lambda _batch: {"index": [1]}, "must be a sequence of integers, not dict; give SelectedIndices the function"),
        (lambda _batch: "12", "must be a sequence of integers, not str"),
        (lambda _batch: torch.tensor(3), "must be a sequence of integers, not Tensor"),
        (lambda _batch: [1.5], r"indices\[0\] \(1.5\) must be an integer, not float"),
        (lambda _batch: [0, True], r"indices\[1\] \(True\) must be an integer, not bool"),
        (
            lambda _batch: torch.zeros(2, 2, dtype=torch.int64),
            r"indices\[0\] \(\[0, 0\]\) must be an integer, not list",
        ),
    ],
)
def test_indices_that_are_none_are_named(loop_over, indices, message):
    with pytest.raises(ValueError, match=message):
        list(jest.SelectedIndices(loop_over([list(range(SUPER_BATCH))]), indices=indices))


def test_sub_batches_that_are_no_indices_are_refused_with_what_to_do(loop_over):
    loop = loop_over([{"index": list(range(SUPER_BATCH))}], indices=lambda batch: batch["index"])
    with pytest.raises(ValueError, match="not dict; give SelectedIndices the function `indices` that reads them"):
        list(jest.SelectedIndices(loop))
