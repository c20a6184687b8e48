"""The loop as trainers drive it: they read ahead, ask for its length, begin epochs, or own the DataLoader."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

import jest_trainer
from jest_core import Embeddings, SelectionPolicy, select_sub_batch, selection_seed
from support.learner import TinyLearner, selected, super_batches

STEPS, ROWS = 30, 64
POLICY = SelectionPolicy(filter_ratio=0.75, num_chunks=4, weights=True)


@pytest.fixture
def client(stack):
    with jest_trainer.Client(stack.address, deadline_s=30) as client:
        yield client


class Recorder(TinyLearner):
    """Remembers what it made of each super-batch, as its weights change from step to step."""

    def __init__(self):
        super().__init__(seed=0)
        self.seen = []

    def embed(self, batch):
        outputs = super().embed(batch)
        self.seen.append((batch, outputs))
        return outputs


class Pairs(Dataset):
    """Pairs under names of their own; remembers which were loaded."""

    def __init__(self, name, count):
        (self.pairs,) = super_batches(count=1, rows=count, seed=77)
        self.pairs["keys"] = [f"{name}-{row}" for row in range(count)]
        self.loaded = []

    def __len__(self):
        return len(self.pairs["keys"])

    def __getitem__(self, index):
        self.loaded.append(index)
        return {name: column[index] for name, column in self.pairs.items()}


class Bar:
    """A progress bar, which takes its total from the iterable as tqdm does."""

    def __init__(self, iterable):
        self.iterable = iterable
        try:
            self.total = len(iterable)
        except (TypeError, AttributeError):
            self.total = None
        self.n = 0

    def __iter__(self):
        for item in self.iterable:
            yield item
            self.n += 1


def one_ahead(batches):
    """Reads one batch ahead of the one it gives, as trainers do to know which is the last."""
    batches = iter(batches)
    read = next(batches)
    for following in batches:
        yield read
        read = following
    yield read


@pytest.mark.parametrize("way", ["with_decisions", "decision_key"])
def test_a_trainer_that_reads_one_batch_ahead_gets_the_weights_of_each_batch(client, unique, reference_towers, way):
    """The weights are computed here a second time, from the learner's outputs of each step."""
    job = client.create_job(unique("ahead"), reference_model="jest_reference", policy=POLICY, seed=9)
    learner, data = Recorder(), super_batches(count=STEPS, rows=ROWS, seed=79 if way == "decision_key" else 80)
    if way == "decision_key":
        pairs = ((batch, batch["jest"]) for batch in one_ahead(selected(job, learner, data, decision_key="jest")))
    else:
        pairs = one_ahead(selected(job, learner, data).with_decisions())
    right, distinct = 0, set()
    for step, (batch, decision) in enumerate(pairs):
        super_batch, outputs = learner.seen[step]
        image, text = reference_towers(super_batch)
        reference = Embeddings(image.half(), text.half(), scale=job.reference.scale, bias=job.reference.bias)
        expected = select_sub_batch(outputs, reference, POLICY, seed=selection_seed(9, step))
        assert batch["keys"] == [super_batch["keys"][position] for position in decision.positions.tolist()]
        right += decision.weights.tolist() == pytest.approx(expected.weights.tolist(), rel=1e-3, abs=1e-3)
        distinct.add(tuple(decision.weights.tolist()))
        learner.step(batch)
    assert (right, len(distinct)) == (STEPS, STEPS)


def test_epochs_with_a_progress_bar_over_a_data_loader(client, unique):
    job = client.create_job(unique("epochs"), reference_model="jest_reference", policy=POLICY)
    dataset = Pairs(unique("pairs"), count=3 * ROWS)
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0)
    learner = TinyLearner(seed=0)
    loop = selected(job, learner, DataLoader(dataset, batch_size=ROWS, sampler=sampler))
    assert (len(loop), loop.batch_size, loop.dataset) == (3, ROWS // 4, dataset)
    for epoch in range(2):
        loop.set_epoch(epoch)
        bar = Bar(loop)
        for batch in bar:
            assert len(batch["keys"]) == loop.batch_size
            learner.step(batch)
        assert bar.n == bar.total == 3
    first, second = dataset.loaded[: len(dataset)], dataset.loaded[len(dataset) :]
    assert sorted(first) == sorted(second) == list(range(len(dataset)))
    assert first != second
    assert job.counters().reference_inferences == len(dataset)


def test_a_data_loader_made_elsewhere_loads_what_was_chosen_and_nothing_else(client, unique):
    policy = SelectionPolicy(filter_ratio=0.75, num_chunks=1, loss="per_example", scoring="hard_learner")
    job = client.create_job(unique("indices"), policy=policy)
    dataset = Pairs(unique("pairs"), count=3 * ROWS)
    losses = torch.rand(len(dataset), generator=torch.Generator().manual_seed(0))
    loop = jest_trainer.SelectedBatches(
        job,
        BatchSampler(range(len(dataset)), ROWS, drop_last=True),
        keys=lambda indices: [dataset.pairs["keys"][index] for index in indices],
        embed=lambda indices: jest_trainer.ExampleLosses(learner=losses[indices]),
    )
    loader = DataLoader(dataset, batch_sampler=jest_trainer.SelectedIndices(loop))
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    for number, batch in enumerate(batches):
        assert batch["keys"] == [dataset.pairs["keys"][i] for i in dataset.loaded[number * 16 : (number + 1) * 16]]
        assert all(number * ROWS <= i < (number + 1) * ROWS for i in dataset.loaded[number * 16 : (number + 1) * 16])
    assert len(set(dataset.loaded)) == len(dataset.loaded) == 3 * ROWS // 4


def test_a_deleted_job_is_gone_with_its_decisions_and_leaves_its_name(client, unique):
    name = unique("deleted")
    data = list(super_batches(count=2, rows=ROWS, seed=78))
    job = client.create_job(name, reference_model="jest_reference", policy=POLICY)
    list(selected(job, TinyLearner(seed=0), data))
    assert client.delete_job(name) is True
    assert client.delete_job(name) is False
    with pytest.raises(jest_trainer.JestError) as caught:
        client.get_job(name)
    assert caught.value.reason == "JOB_UNKNOWN"
    other = client.create_job(name, reference_model="jest_reference", policy=SelectionPolicy(filter_ratio=0.5))
    loop = selected(other, TinyLearner(seed=0), data[::-1])  # other rows under ids that the deleted job had used
    assert [len(batch["keys"]) for batch in loop] == [ROWS // 2] * 2


def test_a_job_without_a_name_is_not_deleted(client):
    with pytest.raises(jest_trainer.JestError) as caught:
        client.delete_job("")
    assert (caught.value.reason, list(caught.value.field_violations)) == ("INVALID_FIELD", ["name"])
