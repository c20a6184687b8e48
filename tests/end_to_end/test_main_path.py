"""The whole path with real parts: SDK, selector, Valkey, scorer and Triton, each in a process of its own."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import jest_trainer
from jest_core import Embeddings, SelectionPolicy, select_sub_batch, selection_seed
from support.learner import TinyLearner, selected, super_batches
from support.polling import wait_until, within

POLICY = SelectionPolicy(filter_ratio=0.75, num_chunks=4)


@pytest.fixture
def client(stack):
    with jest_trainer.Client(stack.address, deadline_s=30) as client:
        yield client


def test_a_training_loop_gets_its_own_batches_reduced_to_the_chosen_rows(client, unique):
    job = client.create_job(unique("loop"), reference_model="jest_reference", policy=POLICY, seed=3)
    learner = TinyLearner(seed=0)
    batches = selected(job, learner, super_batches(count=6, rows=64, seed=1))
    for batch in batches:
        assert len(batch["keys"]) == len(set(batch["keys"])) == 16
        assert batch["image"].shape == (16, 3, 32, 32)
        loss = learner.step(batch)
        assert np.isfinite(loss)
    assert batches.stats.examples_loaded == 6 * 64
    assert batches.stats.examples_trained == 6 * 16
    counters = job.counters()
    assert (counters.submitted, counters.selected, counters.in_flight) == (6, 6, 0)


def test_the_answer_is_what_jest_core_chooses_from_the_same_embeddings(client, unique, reference_towers):
    """The reference embeddings are computed here from the exported weights, apart from Triton."""
    job = client.create_job(unique("oracle"), reference_model="jest_reference", policy=POLICY, seed=9)
    learner = TinyLearner(seed=0)
    (batch,) = super_batches(count=1, rows=64, seed=2)
    batches = selected(job, learner, [batch])
    ((chosen, decision),) = batches.with_decisions()
    image, text = reference_towers(batch)
    reference = Embeddings(image.half(), text.half(), scale=job.reference.scale, bias=job.reference.bias)
    expected = select_sub_batch(learner.embed(batch), reference, POLICY, seed=selection_seed(9, 0))
    assert chosen["keys"] == [batch["keys"][p] for p in expected.positions.tolist()]
    assert decision.perplexity == pytest.approx(expected.perplexity, rel=1e-3)


def test_two_jobs_over_the_same_data_cost_the_reference_model_one_pass(client, unique):
    data = list(super_batches(count=4, rows=64, seed=5))
    inferences = []
    for name in ("first", "second"):
        job = client.create_job(unique(name), reference_model="jest_reference", policy=POLICY)
        batches = selected(job, TinyLearner(seed=0), data)
        assert len(list(batches)) == 4
        inferences.append(job.counters().reference_inferences)
    distinct = {key for batch in data for key in batch["keys"]}
    assert inferences == [len(distinct), 0]


def test_killing_the_scorer_in_the_middle_loses_no_super_batch(stack, client, unique):
    job = client.create_job(
        unique("killed-scorer"), reference_model="jest_reference", policy=POLICY, reference_timeout_s=60
    )
    learner, chosen, restarts = TinyLearner(seed=0), [], stack.restarts("scorer")
    batches = selected(job, learner, super_batches(count=12, rows=128, seed=6), prefetch=4)
    for step, batch in enumerate(batches):
        chosen.append(batch["keys"])
        if step in {2, 6}:
            wait_until(stack.scorer._serves)  # a second kill has to find a living scorer
            stack.kill("scorer")
    wait_until(lambda: stack.restarts("scorer") >= restarts + 2)
    assert len(chosen) == 12
    counters = job.counters()
    assert (counters.submitted, counters.selected, counters.dead_lettered, counters.in_flight) == (12, 12, 0, 0)


@pytest.mark.parametrize(("part", "seed"), [("selector", 70), ("triton", 71)])
def test_killing_any_part_in_the_middle_loses_no_super_batch(stack, client, unique, part, seed):
    job = client.create_job(
        unique(f"killed-{part}"), reference_model="jest_reference", policy=POLICY, reference_timeout_s=60
    )
    batches = selected(job, TinyLearner(seed=0), super_batches(count=12, rows=128, seed=seed), prefetch=3)
    steps, restarts = 0, stack.restarts(part)
    for batch in batches:
        assert len(batch["keys"]) == 32
        steps += 1
        if steps == 3:
            stack.kill(part)
    assert steps == 12
    assert stack.restarts(part) > restarts
    counters = job.counters()
    assert (counters.submitted, counters.selected, counters.dead_lettered, counters.in_flight) == (12, 12, 0, 0)


def test_a_killed_queue_comes_back_with_everything_it_had(stack, client, unique):
    job = client.create_job(
        unique("killed-queue"), reference_model="jest_reference", policy=POLICY, reference_timeout_s=60
    )
    batches = selected(job, TinyLearner(seed=0), super_batches(count=8, rows=64, seed=8), prefetch=3)
    for step, _ in enumerate(batches):
        if step == 3:
            stack.kill("valkey")
    counters = job.counters()
    assert (counters.submitted, counters.selected, counters.dead_lettered, counters.in_flight) == (8, 8, 0, 0)


def test_accounts_balance_at_every_moment_of_a_run(client, unique):
    job = client.create_job(unique("accounts"), reference_model="jest_reference", policy=POLICY)
    unbalanced, done = [], threading.Event()

    def watch():
        while not done.is_set():
            c = job.counters()
            if c.submitted != c.selected + c.dead_lettered + c.in_flight:
                unbalanced.append(c)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert len(list(selected(job, TinyLearner(seed=0), super_batches(count=10, rows=64, seed=9)))) == 10
    finally:
        done.set()
        watcher.join()
    assert not unbalanced


def test_the_declared_fallback_applies_when_the_reference_is_late(stack, client, unique):
    job = client.create_job(
        unique("late"), reference_model="jest_reference", policy=POLICY, fallback="uniform", reference_timeout_s=1
    )
    batches = selected(job, TinyLearner(seed=0), super_batches(count=1, rows=64, seed=10))
    with stack.paused("scorer"), within(10):
        ((batch, decision),) = batches.with_decisions()
    assert len(batch["keys"]) == 16
    assert decision.fallback == "uniform"
    assert "reference_timeout" in decision.fallback_reason
    assert job.counters().fallbacks == 1


def test_without_a_fallback_a_late_reference_is_an_error_and_nothing_is_lost(stack, client, unique):
    job = client.create_job(unique("late-fail"), reference_model="jest_reference", policy=POLICY, reference_timeout_s=1)
    with jest_trainer.Client(stack.address, deadline_s=4) as impatient:
        batches = selected(impatient.get_job(job.name), TinyLearner(seed=0), super_batches(count=1, rows=64, seed=11))
        with stack.paused("scorer"), pytest.raises(jest_trainer.JestError) as caught:
            next(iter(batches))
    assert caught.value.reason in {"REFERENCE_TIMEOUT", "WAITING_FOR_REFERENCE"}
    counters = job.counters()
    assert (counters.submitted, counters.selected, counters.in_flight) == (1, 0, 1)


def test_two_ranks_as_two_clients_train_on_one_decision(stack, client, unique):
    job_name = unique("ranks")
    client.create_job(job_name, reference_model="jest_reference", policy=POLICY, world_size=2)
    chosen: dict[int, list[list[str]]] = {0: [], 1: []}

    def train(rank):
        with jest_trainer.Client(stack.address, deadline_s=30) as own:
            batches = selected(
                own.get_job(job_name), TinyLearner(seed=0), super_batches(count=4, rows=32, seed=20 + rank), rank=rank
            )
            chosen[rank] += [batch["keys"] for batch in batches]

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [len(keys) for rank in range(2) for keys in chosen[rank]] == [8] * 8
    assert torch.equal(torch.tensor([len(set(k)) for k in chosen[0]]), torch.tensor([8] * 4))
