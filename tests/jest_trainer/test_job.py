from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import torch
from scripted_server import fail
from trainer_samples import POLICY

import jest_trainer as jest
from jest_proto.v1 import jobs_pb2, tensors_pb2


def learner(rows, dtype=torch.float32):
    image = torch.arange(2.0 * rows).reshape(rows, 2).to(dtype)
    return jest.Embeddings(image, -image, scale=2.5, bias=-0.5)


@pytest.fixture
def cached_job(server, client):
    server.cached = {"a", "b", "c", "d"}
    job = client.create_job("run-1", reference_model="r", policy=POLICY)
    job.submit("0", ["a", "b", "c", "d"], step=0)
    return job


def test_the_handle_s_repr_names_job_and_server(server, job):
    assert repr(job) == f"Job('run-1', world_size=1, server='{server.address}')"


def test_counters_are_the_server_s(job):
    counters = job.counters()
    assert (counters.submitted, counters.selected, counters.dead_lettered, counters.in_flight) == (5, 2, 1, 2)
    assert counters.examples_loaded == 99


def test_a_submission_sends_keys_rank_and_world_and_learns_what_is_missing(server, client):
    server.cached = {"b"}
    job = client.create_job("run-2", reference_model="r", policy=POLICY, world_size=3)
    submitted = job.submit("x", ["a", "b", "c", "a"], rank=2, step=0)
    assert (submitted.missing_positions, submitted.decided, submitted.reference.version) == ((0, 2), False, "7")
    (request,) = server.requests("SubmitSuperBatch")
    assert (request.job, request.super_batch_id, request.rank, request.world_size) == ("run-2", "x", 2, 3)
    assert list(request.example_keys) == ["a", "b", "c", "a"]


def test_a_submission_without_labels_leaves_them_out(server, job):
    job.submit("x", ["a", "b"], step=0)
    (request,) = server.requests("SubmitSuperBatch")
    assert (request.HasField("step"), request.step) == (True, 0)
    assert list(request.group_labels) == []


def test_a_submission_sends_its_step_and_the_labels_of_its_groups(server, client):
    policy = jest.SelectionPolicy(filter_ratio=0.5, gain=jest.Schedule(start=1.0), num_chunks=1, max_per_group=1)
    job = client.create_job("run", reference_model="r", policy=policy)
    job.submit("x", ["a", "b", "c"], step=0, group_labels=["dog", None, 7])
    (request,) = server.requests("SubmitSuperBatch")
    assert request.HasField("step")
    assert request.step == 0
    assert list(request.group_labels) == ["dog", "", "7"]


def test_a_submission_sends_where_its_examples_are(server, job):
    job.submit("x", ["a", "b"], sources=["s3://bucket/0.tar#a", None], step=0)
    assert list(server.requests("SubmitSuperBatch")[0].example_sources) == ["s3://bucket/0.tar#a", ""]


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"max_per_group": 3}, {}, "group_labels must be given: max_per_group is 3 in job 'run'"),
        ({}, {"group_labels": ["dog"]}, "group_labels has 1 labels for a super-batch with 2 keys"),
        ({}, {"group_labels": ["dog", 1.5]}, r"group_labels\[1\] \(1.5\) must be a string or an integer, not float"),
        ({}, {"group_labels": "dogs"}, "group_labels must hold one label for each row, not be a single string"),
        ({}, {"sources": ["s3://b/a.png"]}, "sources has 1 sources for a super-batch with 2 keys"),
        ({}, {"sources": ["s3://b/a.png", 3]}, r"sources\[1\] \(3\) must be a string or None, not int"),
        ({}, {"sources": "s3://b/a.png"}, "sources must hold one source for each row, not be a single string"),
    ],
)
def test_a_submission_that_the_policy_cannot_use_is_refused_before_it_is_sent(
    server, client, fields, arguments, message
):
    policy = jest.SelectionPolicy(**{"filter_ratio": 0.5, "num_chunks": 1} | fields)
    job = client.create_job("run", reference_model="r", policy=policy)
    with pytest.raises(ValueError, match=message):
        job.submit("x", ["a", "b"], step=0, **arguments)
    assert server.count("SubmitSuperBatch") == 0


def test_a_job_without_a_reference_model_wants_nothing_uploaded(client):
    job = client.create_job("run", policy=jest.SelectionPolicy(scoring="uniform", filter_ratio=0.5, num_chunks=1))
    submitted = job.submit("x", ["a", "b"], step=0)
    assert (submitted.missing_positions, submitted.reference) == ((), None)


def test_a_rank_outside_the_world_is_refused_before_anything_is_sent(server, job):
    with pytest.raises(ValueError, match=r"rank \(1\) must lie in \[0, 1\)"):
        job.submit("x", ["a"], rank=1, step=0)
    assert server.count("SubmitSuperBatch") == 0


def test_an_upload_brings_each_row_s_features_to_its_key(server, job):
    job.submit("x", ["a", "b", "c"], step=0)
    image = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    assert job.upload("x", [0, 2], {"image": image, "tokens": tokens}) == 2
    assert server.features == {
        key: {"image": image[row].numpy().tobytes(), "tokens": tokens[row].tobytes()}
        for row, key in ((0, "a"), (1, "c"))
    }


def test_a_large_upload_is_cut_into_parts_of_bounded_size(server, job):
    keys = [f"k{row}" for row in range(5)]
    job.submit("x", keys, step=0)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7 << 20), np.uint8)
    assert job.upload("x", range(5), {"image": pixels}) == 5
    assert [list(header.positions) for header in server.requests("UploadExamples")] == [[0, 1], [2, 3], [4]]
    assert [server.features[key]["image"] for key in keys] == [row.tobytes() for row in pixels]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({}, "must be a mapping of one or more named arrays"),
        ([1], "must be a mapping"),
        ({"image": [1, 2]}, r"features\['image'\] must be a tensor or a NumPy array, not list"),
        ({"image": np.zeros(3)}, r"features\['image'\] has shape \[3\], expected 2 rows"),
        ({"image": torch.zeros(())}, r"features\['image'\] has shape \[\], expected 2 rows"),
    ],
)
def test_features_that_do_not_fit_the_positions_are_refused(server, job, features, message):
    job.submit("x", ["a", "b"], step=0)
    with pytest.raises(ValueError, match=message):
        job.upload("x", [0, 1], features)
    assert server.count("UploadExamples") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_selection_sends_embeddings_as_they_are_with_scale_and_bias(server, cached_job, dtype):
    cached_job.select("0", learner(4, dtype))
    (header,) = server.requests("SelectSubBatch")
    names = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}
    assert [(s.name, s.datatype, list(s.shape)) for s in header.tensors] == [
        ("image_embedding", names[dtype], [4, 2]),
        ("text_embedding", names[dtype], [4, 2]),
    ]
    assert (header.embeddings.scale, header.embeddings.bias) == (2.5, -0.5)


def test_outputs_of_another_kind_are_refused_before_they_are_sent(server, cached_job):
    with pytest.raises(ValueError, match=r"outputs must be jest_trainer.Embeddings, not jest_trainer.PairLosses"):
        cached_job.select("0", jest.PairLosses(torch.ones(4, 4)))
    assert server.count("SelectSubBatch") == 0


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [
        ("pairwise", jest.PairLosses(torch.tensor([[0.0, 1.0], [5.0, 0.0]]))),
        ("per_example", jest.ExampleLosses(torch.tensor([3.0, 9.0]), torch.tensor([2.0, 1.0]))),
    ],
)
def test_losses_are_sent_by_a_raw_call_too(server, client, loss, outputs):
    server.cached = {"a", "b"}
    policy = jest.SelectionPolicy(loss=loss, filter_ratio=0.5, num_chunks=1)
    job = client.create_job("run", reference_model="r", policy=policy)
    job.submit("x", ["a", "b"], step=0)
    assert job.select("x", outputs).positions.tolist() == [1]


def test_the_pair_losses_of_two_ranks_have_a_column_for_each_row_of_both(server, client):
    server.cached = set("abcde")
    policy = jest.SelectionPolicy(loss="pairwise", sub_batch_size=2, num_chunks=1)
    job = client.create_job("run", reference_model="r", policy=policy, world_size=2)
    losses = torch.arange(25.0).reshape(5, 5)
    shares = {0: ("ab", losses[:2]), 1: ("cde", losses[2:])}
    for rank, (keys, _) in shares.items():
        job.submit("x", list(keys), rank=rank, step=0)
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda rank: job.select("x", jest.PairLosses(shares[rank][1]), rank), shares))
    assert [answer.positions.tolist() for answer in answers] == [[1], [2]]
    for rank, (_, share) in shares.items():
        assert server.outputs["x", rank]["pair_losses"].tolist() == share.tolist()


def test_without_weights_in_the_policy_there_are_none(cached_job):
    assert cached_job.select("0", learner(4)).weights is None


def test_the_gain_of_the_step_comes_back(server, client):
    server.cached = {"a", "b"}
    policy = jest.SelectionPolicy(
        filter_ratio=0.5, num_chunks=1, gain=jest.Schedule(start=0.0, shape="linear", end=8.0, steps=4)
    )
    job = client.create_job("run", reference_model="r", policy=policy)
    job.submit("x", ["a", "b"], step=3)
    assert job.select("x", learner(2)).gain == 6.0


def test_weights_that_are_not_one_for_each_row_are_an_error(server, client):
    server.cached = {"a", "b"}
    job = client.create_job(
        "run", reference_model="r", policy=jest.SelectionPolicy(filter_ratio=0.5, num_chunks=1, weights=True)
    )
    job.submit("x", ["a", "b"], step=0)
    server.answers = {"weights": [1.0]}  # beside the one that is there
    with pytest.raises(jest.JestError, match="has 2 weights for 1 positions") as caught:
        job.select("x", learner(2))
    assert caught.value.reason == "BAD_ANSWER"


def test_a_decision_comes_back_with_all_that_is_known_of_it(server, cached_job):
    server.answers = {"fallback": jobs_pb2.FALLBACK_HARD_LEARNER, "fallback_reason": "late"}
    chosen = cached_job.select("0", learner(4))
    assert chosen.positions.dtype == torch.int64
    assert chosen.positions.tolist() == [3]
    assert (chosen.super_batch_id, chosen.sub_batch_size, chosen.super_batch_size) == ("0", 1, 4)
    assert (chosen.reference_version, chosen.cache_hits, chosen.reference_inferences) == ("7", 1, 2)
    assert (chosen.perplexity, chosen.fallback, chosen.fallback_reason) == ((4.0, 2.0), "hard_learner", "late")
    assert (chosen.timings.compute, chosen.timings.queue) == (0.25, 0.0)
    assert chosen.reference_embeddings is None


def test_without_a_fallback_the_answer_has_none(cached_job):
    assert cached_job.select("0", learner(4)).fallback is None


def test_reference_embeddings_of_the_chosen_come_on_request(cached_job):
    chosen = cached_job.select("0", learner(4), return_reference_embeddings=True)
    assert chosen.reference_embeddings.image.dtype == torch.float16
    assert chosen.reference_embeddings.image.tolist() == [[3.0, 3.0, 3.0]]
    assert chosen.reference_embeddings.text.tolist() == [[-3.0, -3.0, -3.0]]


@pytest.mark.parametrize(
    "changes",
    [{"xxh3_64": 1}, {"byte_length": 5}, {"name": "other"}],
)
def test_reference_embeddings_that_were_damaged_are_an_error(server, cached_job, changes):
    spec = {"name": "image_embedding", "datatype": "FP16", "shape": [1, 1], "byte_length": 2} | changes
    server.answers = {"reference_embeddings": [tensors_pb2.Tensor(spec=tensors_pb2.TensorSpec(**spec), data=b"ab")]}
    with pytest.raises(jest.JestError, match="cannot be read") as caught:
        cached_job.select("0", learner(4))
    assert caught.value.reason == "BAD_ANSWER"


def test_repeating_the_three_calls_gives_the_same_answer(server, job):
    def whole():
        submitted = job.submit("x", ["a", "b", "c", "d"], step=0)
        if submitted.missing_positions:
            job.upload("x", submitted.missing_positions, {"image": np.zeros((4, 1), np.uint8)})
        return job.select("x", learner(4)).positions.tolist()

    assert whole() == whole()
    assert server.count("UploadExamples") == 1


def test_a_refusal_reaches_the_caller_of_a_raw_call(server, cached_job):
    server.script["SelectSubBatch"].append(
        fail(grpc.StatusCode.DEADLINE_EXCEEDED, "WAITING_FOR_RANKS", "ranks [1] have not come")
    )
    with pytest.raises(jest.JestError, match=r"ranks \[1\] have not come") as caught:
        cached_job.select("0", learner(4))
    assert caught.value.reason == "WAITING_FOR_RANKS"


def test_an_attempt_is_opened_for_each_start(server, job):
    assert job.open_attempt(launch="monday", parent="a1", parent_step=7) == "a1"
    (request,) = server.requests("OpenAttempt")
    assert (request.job, request.rank, request.world_size) == (job.name, 0, job.world_size)
    assert (request.launch, request.parent, request.parent_step) == ("monday", "a1", 7)
    job.open_attempt()
    first, second = (call.process_nonce for call in server.requests("OpenAttempt"))
    assert first != second


@pytest.mark.parametrize("parent", [{"parent": "a1"}, {"parent_step": 3}])
def test_a_parent_and_its_step_go_together(server, job, parent):
    with pytest.raises(ValueError, match="must be given together"):
        job.open_attempt(**parent)
    assert server.count("OpenAttempt") == 0
