"""What trainers and progress bars ask of a loop besides its batches; the loaders are PyTorch's own."""

from __future__ import annotations

import grpc
import pytest
import torch
from scripted_server import fail
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler
from trainer_samples import super_batch

import jest_trainer as jest
from jest_trainer._loop.loader_shape import LoaderShape

ROWS = 24


class Rows(Dataset):
    """A map-style dataset; its items become batches like `super_batch`'s."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        features = {"image": torch.zeros(3, 2, 2, dtype=torch.uint8), "tokens": torch.zeros(4, dtype=torch.int32)}
        return {"keys": f"k{index}", "row": index % 8, **features}


class Stream(IterableDataset):
    """An iterable dataset with epochs."""

    def __init__(self):
        self.epochs = []

    def __iter__(self):
        return map(Rows().__getitem__, range(ROWS))

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


class Epochs:
    """Something that has epochs and whatever parts it is given."""

    def __init__(self, **parts):
        self.epochs = []
        self.__dict__.update(parts)

    def __iter__(self):
        return iter(())

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


@pytest.fixture
def loop_over(make_loop):
    def features(batch):
        return {name: batch[name] for name in ("image", "tokens")}

    return lambda loader, **options: make_loop(loader, features=features, **options)


@pytest.fixture
def job_with(client):
    """Makes a job with a policy of these fields."""

    def make(*, world_size=1, **fields):
        policy = jest.SelectionPolicy(**{"num_chunks": 2} | fields)
        return client.create_job("run-2", reference_model="reference", policy=policy, world_size=world_size)

    return make


# Length


@pytest.mark.parametrize("loader", [[super_batch(0), super_batch(1)], DataLoader(Rows(), batch_size=12)])
def test_the_length_is_the_loader_s_also_beside_decisions(make_loop, loader):
    loop = make_loop(loader)
    assert (len(loop), len(loop.with_decisions())) == (2, 2)


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        ((super_batch(step) for step in range(2)), "object of type 'generator' has no len"),
        (DataLoader(Stream(), batch_size=8), "object of type 'Stream' has no len"),
    ],
)
def test_a_loop_over_a_loader_without_length_has_none_and_says_why(make_loop, loader, reason):
    loop = make_loop(loader)
    with pytest.raises(TypeError, match=rf"^SelectedBatches has no len\(\): {reason}"):
        len(loop)
    with pytest.raises(TypeError, match=rf"^DecidedBatches has no len\(\): SelectedBatches has no len\(\): {reason}"):
        len(loop.with_decisions())


def test_as_many_batches_come_out_as_the_length_says_in_each_epoch(loop_over):
    loop = loop_over(DataLoader(Rows(), batch_size=8))
    for _ in range(3):
        assert len([*loop]) == len(loop) == 3


def test_a_resumed_loop_has_the_length_of_a_whole_pass_and_yields_the_rest(make_loop):
    class Resumed(list):
        """Begins where a checkpoint says, and has the length of all, as stateful loaders do."""

        def __iter__(self):
            return iter(self[2:])

    loop = make_loop(Resumed(super_batch(step) for step in range(5)))
    loop.load_state_dict({"next_step": 2})
    assert len(loop) == 5
    assert [batch["step"] for batch in loop] == [2, 3, 4]


def test_a_dead_lettered_super_batch_makes_a_pass_shorter_than_its_length(server, make_loop):
    server.script["SelectSubBatch"].append(fail(grpc.StatusCode.ABORTED, "DEAD_LETTERED"))
    loop = make_loop([super_batch(step) for step in range(3)])
    assert (len(loop), len([*loop]), loop.stats.dead_lettered) == (3, 2, 1)


# Parts


def test_parts_of_the_loader_are_found_at_the_loop_and_beside_decisions(make_loop):
    loader = DataLoader(Rows(), batch_size=8, shuffle=True)
    loader.num_batches, loader.num_samples = 3, ROWS  # as open_clip does
    loop = make_loop(loader)
    for shape in (loop, loop.with_decisions()):
        assert shape.dataset is loader.dataset
        assert shape.sampler is loader.sampler
        assert shape.batch_sampler is loader.batch_sampler
        assert (shape.num_batches, shape.num_samples) == (3, ROWS)


@pytest.mark.parametrize("name", ["dataset", "sampler", "batch_sampler", "batch_size", "num_batches", "num_samples"])
def test_a_part_that_the_loader_lacks_is_an_attribute_error_that_says_so(make_loop, name):
    loop = make_loop([])
    assert not hasattr(loop, name)
    with pytest.raises(
        AttributeError, match=f"^SelectedBatches has no {name}: 'list' object has no attribute '{name}'"
    ):
        getattr(loop, name)


# Batch size


@pytest.mark.parametrize(
    ("size", "ranks", "expected"),
    [
        ({"filter_ratio": 0.75}, 1, 6),
        ({"filter_ratio": 0.75}, 2, 6),
        ({"filter_ratio": 0.75, "placement": "global"}, 1, 6),
        ({"filter_ratio": 0.75, "placement": "global"}, 2, None),
        ({"filter_ratio": jest.Schedule(start=0.75)}, 1, None),
        ({"sub_batch_size": 8}, 2, 4),
        ({"sub_batch_size": 8, "gain": jest.Schedule(start=1.0)}, 2, 4),
    ],
)
def test_the_batch_size_is_that_of_what_comes_out_on_this_rank(make_loop, job_with, size, ranks, expected):
    loop = make_loop(DataLoader(Rows(), batch_size=24), job=job_with(world_size=ranks, **size), rank=0)
    assert loop.batch_size == loop.with_decisions().batch_size == expected


def test_the_batch_size_is_that_of_a_batch(loop_over):
    loop = loop_over(DataLoader(Rows(), batch_size=8))
    assert {len(batch["keys"]) for batch in loop} == {loop.batch_size}


def test_a_sub_batch_size_is_a_batch_size_whatever_the_loader(make_loop, job_with):
    assert make_loop([], job=job_with(sub_batch_size=8)).batch_size == 8


def test_a_loader_that_does_not_know_its_batch_size_leaves_it_unknown(make_loop):
    sampler = BatchSampler(RandomSampler(Rows()), 8, drop_last=True)
    assert make_loop(DataLoader(Rows(), batch_sampler=sampler)).batch_size is None


def test_a_batch_size_that_the_policy_leaves_too_little_of_is_named(make_loop, job_with):
    loop = make_loop(DataLoader(Rows(), batch_size=4), job=job_with(filter_ratio=0.75))
    with pytest.raises(ValueError, match=r"num_chunks \(2\) is larger than the sub-batch \(1\)"):
        _ = loop.batch_size


# Epochs


def test_an_epoch_reaches_the_sampler_of_a_data_loader(loop_over):
    sampler = DistributedSampler(Rows(), num_replicas=1, rank=0)
    loop = loop_over(DataLoader(Rows(), batch_size=8, sampler=sampler), take=lambda batch, _positions: batch["keys"])
    orders = []
    for epoch in (0, 1, 0):
        loop.set_epoch(epoch)
        orders.append([*loop])
    assert orders[0] == orders[2] != orders[1]


def test_an_epoch_reaches_an_iterable_dataset(make_loop):
    dataset = Stream()
    make_loop(DataLoader(dataset, batch_size=8)).with_decisions().set_epoch(4)
    assert dataset.epochs == [4]


def test_an_epoch_reaches_every_part_once():
    sampler, dataset = Epochs(), Epochs()
    batch_sampler = Epochs(sampler=sampler)
    loader = Epochs(sampler=sampler, batch_sampler=batch_sampler, dataset=dataset)
    LoaderShape(LoaderShape(loader)).set_epoch(2)
    assert [part.epochs for part in (loader, sampler, batch_sampler, dataset)] == [[2]] * 4


def test_a_loop_without_epochs_has_no_set_epoch_and_says_why(make_loop):
    loop = make_loop(DataLoader(Rows(), batch_size=8))
    assert not hasattr(loop, "set_epoch")
    with pytest.raises(AttributeError, match="no set_epoch: neither DataLoader nor a sampler or dataset of it has"):
        loop.set_epoch(1)
