"""A loop under the policies that ask more of it than embeddings."""

from __future__ import annotations

import doctest
import threading

import grpc
import numpy as np
import pytest
import torch
from scripted_server import fail
from torch.nn import functional
from trainer_samples import EXPECTED_ROWS, embeddings, super_batch

import jest_trainer as jest
from jest_trainer.results import SubBatch


@pytest.fixture
def job_with(client):
    """Makes a job with a policy of these fields."""

    def make(*, reference_model="reference", **fields):
        policy = jest.SelectionPolicy(**{"filter_ratio": 0.75, "num_chunks": 2} | fields)
        return client.create_job("run-2", reference_model=reference_model, policy=policy)

    return make


def labels(batch):
    """Rows 5 and 7, the best, are dogs; 1 and 3 belong to no group."""
    return ["cat", None, "cat", None, "cat", "dog", "cat", "dog"]


# Groups


def test_a_capped_group_gives_no_more_than_its_share(server, make_loop, job_with):
    job = job_with(max_per_group=1)
    (batch,) = make_loop([super_batch(0)], job=job, group_labels=labels)
    assert batch["row"].tolist() == [7, 3]
    assert list(server.requests("SubmitSuperBatch")[0].group_labels) == [label or "" for label in labels(None)]


def test_labels_are_made_in_the_background_thread(make_loop, job_with):
    threads = []

    def labelled(batch):
        threads.append(threading.current_thread())
        return labels(batch)

    list(make_loop([super_batch(0)], job=job_with(max_per_group=1), group_labels=labelled))
    assert threads[0] is not threading.main_thread()


@pytest.mark.parametrize("cluster", [torch.arange(8) // 4, np.arange(8) // 4, [0, 0, 0, 0, 1, 1, 1, 1]])
def test_labels_may_be_integers(server, make_loop, job_with, cluster):
    list(make_loop([super_batch(0)], job=job_with(max_per_group=1), group_labels=lambda _batch: cluster))
    assert list(server.requests("SubmitSuperBatch")[0].group_labels) == ["0"] * 4 + ["1"] * 4


def test_labels_without_a_cap_are_sent_all_the_same(server, make_loop):
    (batch,) = make_loop([super_batch(0)], group_labels=labels)
    assert batch["row"].tolist() == EXPECTED_ROWS
    assert server.requests("SubmitSuperBatch")[0].group_labels


def test_a_cap_without_labels_is_refused_when_the_loop_is_made(make_loop, job_with):
    with pytest.raises(ValueError, match="group_labels must be given: the job's policy has max_per_group=1"):
        make_loop([], job=job_with(max_per_group=1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["dog"], "group_labels has 1 labels for a super-batch with 8 keys"),
        ("dogs-dog", "not be a single string"),
        ([None] * 7 + [True], r"group_labels\[7\] \(True\) must be a string or an integer, not bool"),
    ],
)
def test_labels_that_cannot_be_are_named(make_loop, wrong, message):
    with pytest.raises(ValueError, match=message):
        list(make_loop([super_batch(0)], group_labels=lambda _batch: wrong))


# Steps


def test_every_submission_tells_the_loop_s_step(server, make_loop):
    loop = make_loop([super_batch(0), super_batch(1)])
    list(loop)
    list(loop)
    assert [request.step for request in server.requests("SubmitSuperBatch")] == [0, 1, 2, 3]
    assert all(request.HasField("step") for request in server.requests("SubmitSuperBatch"))


def test_a_resumed_loop_goes_on_with_its_schedule(server, make_loop, job_with):
    gain = jest.Schedule(start=0.0, shape="linear", end=10.0, steps=10)
    loop = make_loop([super_batch(4), super_batch(5)], job=job_with(gain=gain))
    loop.load_state_dict({"next_step": 4})
    assert [decision.gain for _, decision in loop.with_decisions()] == [4.0, 5.0]
    assert [request.step for request in server.requests("SubmitSuperBatch")] == [4, 5]


def test_a_scheduled_filter_ratio_changes_how_many_rows_come_out(make_loop, job_with):
    ratio = jest.Schedule(start=0.75, warmup_steps=3)
    loop = make_loop([super_batch(step) for step in range(4)], job=job_with(filter_ratio=ratio))
    assert [len(batch["keys"]) for batch in loop] == [8, 6, 4, 2]


def test_what_was_evicted_is_submitted_again_with_the_same_step_and_labels(server, make_loop, job_with):
    def embed(batch):
        server.evict()
        return embeddings(batch)

    list(make_loop([super_batch(0)], job=job_with(max_per_group=1), group_labels=labels, embed=embed))
    first, second = server.requests("SubmitSuperBatch")
    assert first == second


# Losses


def pair_losses(batch, dtype=torch.float32):
    """Row i's losses sum up to 8 * (i % 2) + i / 100: the odd rows are worth most, in the order of `EXPECTED_ROWS`."""
    row = batch["row"]
    return jest.PairLosses(((row % 2) + row / 100)[:, None].expand(8, 8).to(dtype))


def test_pair_losses_arrive_whole(server, make_loop, job_with):
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(8, 8, generator=generator)
    job = job_with(loss="pairwise")
    (batch,) = make_loop([super_batch(0)], job=job, embed=lambda _batch: jest.PairLosses(losses))
    assert server.outputs["00000000", 0]["pair_losses"].astype(np.float32).tolist() == losses.tolist()
    assert batch["row"].tolist() == losses.sum(1).argsort(descending=True)[:2].tolist()


@pytest.mark.parametrize(("wire_dtype", "name"), [("as_is", "FP32"), ("fp16", "FP16"), ("bf16", "BF16")])
def test_pair_losses_travel_in_the_wire_type(server, make_loop, job_with, wire_dtype, name):
    list(make_loop([super_batch(0)], job=job_with(loss="pairwise"), embed=pair_losses, wire_dtype=wire_dtype))
    (header,) = server.requests("SelectSubBatch")
    assert {spec.datatype for spec in header.tensors} == {name}


def test_pair_losses_of_many_tiles_survive_a_failed_attempt(server, make_loop, client):
    rows = 800
    losses = torch.rand(rows, rows, generator=torch.Generator().manual_seed(0))
    policy = jest.SelectionPolicy(loss="pairwise", filter_ratio=0.75)
    job = client.create_job("wide", reference_model="reference", policy=policy)
    server.cached = {f"0-{row}" for row in range(rows)}
    server.script["SelectSubBatch"].append(fail(grpc.StatusCode.DATA_LOSS, "CHECKSUM_MISMATCH", retry_after_s=0.0))
    list(make_loop([super_batch(0, rows)], job=job, embed=lambda _batch: jest.PairLosses(losses)))
    assert server.count("SelectSubBatch") == 2
    assert server.outputs["00000000", 0]["pair_losses"].astype(np.float32).tolist() == losses.tolist()


def example_losses(batch):
    row = batch["row"]
    return jest.ExampleLosses(learner=10 + (row % 2) + row / 100, reference=torch.full((8,), 10.0))


def test_losses_of_single_examples_choose_without_a_reference_model(server, make_loop, job_with):
    job = job_with(loss="per_example", reference_model=None)
    (batch,) = make_loop([super_batch(0)], job=job, embed=example_losses, features=None)
    assert batch["row"].tolist() == EXPECTED_ROWS
    assert set(server.outputs["00000000", 0]) == {"learner_loss", "reference_loss"}
    assert server.count("UploadExamples") == 0


@pytest.mark.parametrize(
    ("loss", "embed", "message"),
    [
        (
            "pairwise",
            embeddings,
            "what embed returned must be jest_trainer.PairLosses, not jest_core.Embeddings: .*'pair",
        ),
        ("sigmoid", pair_losses, "must be jest_trainer.Embeddings, not jest_trainer.PairLosses: .*'sigmoid'"),
        ("per_example", embeddings, "must be jest_trainer.ExampleLosses, not jest_core.Embeddings: .*'per_example'"),
    ],
)
def test_another_kind_than_the_loss_wants_is_refused_before_it_is_sent(
    server, make_loop, job_with, loss, embed, message
):
    with pytest.raises(ValueError, match=message):
        list(make_loop([super_batch(0)], job=job_with(loss=loss), embed=embed))
    assert server.count("SelectSubBatch") == 0


def test_a_policy_that_needs_the_reference_model_needs_features(make_loop):
    with pytest.raises(ValueError, match="features must be given: scoring 'learnability' under loss 'sigmoid' needs"):
        make_loop([], features=None)


def test_a_server_that_wants_features_of_a_loop_without_them_is_an_error(make_loop, job_with):
    with pytest.raises(ValueError, match="features must be given: the server lacks 8 rows of a super-batch"):
        list(make_loop([super_batch(0)], job=job_with(scoring="hard_learner"), features=None))


def test_a_policy_without_reference_embeddings_cannot_return_them(make_loop, job_with):
    with pytest.raises(ValueError, match="return_reference_embeddings must be False: scoring 'uniform' under loss"):
        make_loop([], job=job_with(scoring="uniform"), return_reference_embeddings=True)


# What comes back


def test_weights_of_the_chosen_rows_come_with_the_decision(make_loop, job_with):
    loop = make_loop([super_batch(0)], job=job_with(weights=True))
    ((batch, decision),) = loop.with_decisions()
    assert decision.weights.dtype == torch.float32
    assert decision.weights.tolist() == pytest.approx([4 / 3, 2 / 3])
    assert len(batch["keys"]) == 2


def test_the_gain_that_was_used_comes_with_the_decision(make_loop, job_with):
    loop = make_loop([super_batch(0)], job=job_with(gain=2.5))
    assert [decision.gain for _, decision in loop.with_decisions()] == [2.5]


def test_the_distillation_in_sub_batch_s_docstring_runs_and_pulls_towards_the_reference(make_loop, job):
    loop = make_loop([super_batch(0)], return_reference_embeddings=True)
    ((_, decision),) = loop.with_decisions()
    width = decision.reference_embeddings.image.shape[1]
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.rand(2, width, generator=generator, requires_grad=True) for _ in range(2))
    known = {"decision": decision, "job": job, "functional": functional, "image": image, "text": text, "scale": 2.0}
    example = doctest.DocTestParser().get_doctest(SubBatch.__doc__, known, "SubBatch", None, None)
    assert example.examples
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0

    teacher = decision.reference_embeddings
    target = job.reference.scale * teacher.image.double() @ teacher.text.double().T
    logits = 2.0 * image.double() @ text.double().T
    both_ways = [-(target.softmax(axis) * logits.log_softmax(axis)).sum(axis).mean() for axis in (0, 1)]
    assert example.globs["distillation"].item() == pytest.approx(sum(both_ways).item() / 2, rel=1e-5)
    example.globs["distillation"].backward()
    assert image.grad.abs().sum() > 0
