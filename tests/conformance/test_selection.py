import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from conformance.speaker import TIMEOUT_S, features, fresh_keys, refusal_of, unit_embeddings
from jest_proto.v1 import jobs_pb2, selection_pb2


def counters(speaker, name):
    return speaker.jobs.GetJob(jobs_pb2.GetJobRequest(name=name), timeout=TIMEOUT_S).job.counters


@pytest.mark.parametrize("service", ["", "jest.v1.SelectionService", "jest.v1.JobService"])
def test_health_is_answered_for_each_service(speaker, service):
    stub = health_pb2_grpc.HealthStub(speaker.channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_services(speaker):
    services = ProtoReflectionDescriptorDatabase(speaker.channel).get_services()
    assert {"jest.v1.SelectionService", "jest.v1.JobService", "grpc.health.v1.Health"} <= set(services)


def test_the_server_tells_its_version_limits_and_abilities(speaker):
    info = speaker.selection.GetServerInfo(selection_pb2.GetServerInfoRequest(), timeout=TIMEOUT_S)
    assert info.version
    assert jobs_pb2.SCORING_LEARNABILITY in info.scorings
    losses = {jobs_pb2.LOSS_SIGMOID, jobs_pb2.LOSS_SOFTMAX, jobs_pb2.LOSS_PAIRWISE, jobs_pb2.LOSS_PER_EXAMPLE}
    assert set(info.losses) == losses
    assert set(info.precisions) == {jobs_pb2.PRECISION_FLOAT32, jobs_pb2.PRECISION_BFLOAT16}
    assert set(info.learner_datatypes) == {"FP32", "FP16", "BF16"}
    assert min(info.max_rows_per_rank, info.max_tensor_bytes, info.max_message_bytes, info.max_world_size) > 0
    assert info.max_pair_loss_bytes > 0


def test_a_super_batch_becomes_a_sub_batch_of_distinct_positions(speaker):
    job = speaker.create_job()
    answer = speaker.walk(job, "sb-1", fresh_keys(64))
    assert len(answer.positions) == len(set(answer.positions)) == answer.sub_batch_size == 16
    assert max(answer.positions) < answer.super_batch_size == 64
    assert answer.reference_version == job.reference.version
    assert (answer.reference_inferences, answer.cache_hits) == (64, 0)
    assert len(answer.perplexity) == 4
    assert all(1 <= value <= 64 for value in answer.perplexity)
    assert answer.fallback == jobs_pb2.FALLBACK_UNSPECIFIED
    assert answer.timings.HasField("compute")


def test_what_is_cached_is_neither_asked_for_nor_computed_again(speaker):
    job, keys = speaker.create_job(), fresh_keys(64)
    speaker.walk(job, "first", keys)
    assert not speaker.submit(job.spec.name, "second", keys).missing_positions
    answer = speaker.select(job.spec.name, "second", unit_embeddings(64, seed=1))
    assert (answer.reference_inferences, answer.cache_hits) == (0, 64)


def test_equal_keys_are_uploaded_once_and_chosen_at_most_once(speaker):
    job = speaker.create_job()
    distinct = fresh_keys(20)
    keys = distinct + distinct[:12]
    missing = speaker.submit(job.spec.name, "dup", keys).missing_positions
    assert list(missing) == list(range(20))
    answer = speaker.walk(job, "dup", keys)
    assert answer.reference_inferences == 20
    assert len({keys[p] for p in answer.positions}) == len(answer.positions) == 8


def test_every_call_may_be_repeated_and_answers_the_same(speaker):
    job, keys = speaker.create_job(), fresh_keys(32)
    name = job.spec.name
    first = speaker.submit(name, "again", keys)
    assert speaker.submit(name, "again", keys).missing_positions == first.missing_positions
    everything = features(job, keys)
    for _ in range(2):
        assert speaker.upload(name, "again", list(range(32)), everything).accepted == 32
    learner = unit_embeddings(32, seed=2)
    answers = [speaker.select(name, "again", learner) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert speaker.submit(name, "again", keys).decided
    assert speaker.upload(name, "again", list(range(32)), everything).accepted == 32
    assert answers[0].reference_inferences == 32
    account = counters(speaker, name)
    assert (account.submitted, account.selected, account.in_flight) == (1, 1, 0)


def test_the_same_seed_and_inputs_give_the_same_choice_in_another_job(speaker):
    keys = fresh_keys(48)
    answers = [speaker.walk(speaker.create_job(), "same", keys, seed=3).positions for _ in range(2)]
    other_seed = speaker.walk(speaker.create_job(seed=12), "same", keys, seed=3).positions
    assert answers[0] == answers[1]
    assert answers[0] != other_seed


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_learner_outputs_come_in_any_floating_type_and_width(speaker, dtype):
    job, keys = speaker.create_job(), fresh_keys(16)
    missing = list(speaker.submit(job.spec.name, "types", keys).missing_positions)
    speaker.upload(job.spec.name, "types", missing, features(job, keys))
    answer = speaker.select(job.spec.name, "types", unit_embeddings(16, seed=1, width=40, dtype=dtype))
    assert len(answer.positions) == 4


def test_two_ranks_get_their_own_halves_of_one_decision(speaker):
    job = speaker.create_job(world_size=2)
    name, keys = job.spec.name, [fresh_keys(32), fresh_keys(32)]
    for rank in range(2):
        missing = list(speaker.submit(name, "halves", keys[rank], rank=rank, world_size=2).missing_positions)
        speaker.upload(name, "halves", missing, features(job, keys[rank]), rank=rank)
    calls = [
        speaker.select(name, "halves", unit_embeddings(32, seed=rank), rank=rank, world_size=2, wait=False)
        for rank in range(2)
    ]
    answers = [call.result() for call in calls]
    assert [len(answer.positions) for answer in answers] == [8, 8]
    assert all(len(set(answer.positions)) == 8 and max(answer.positions) < 32 for answer in answers)
    assert answers[0].perplexity == answers[1].perplexity
    assert answers[0].sub_batch_size == 16


def test_reference_embeddings_of_the_chosen_come_on_request(speaker):
    job, keys = speaker.create_job(), fresh_keys(16)
    missing = list(speaker.submit(job.spec.name, "distil", keys).missing_positions)
    speaker.upload(job.spec.name, "distil", missing, features(job, keys))
    answer = speaker.select(job.spec.name, "distil", unit_embeddings(16, seed=1), return_reference_embeddings=True)
    assert [t.spec.name for t in answer.reference_embeddings] == ["image_embedding", "text_embedding"]
    for tensor in answer.reference_embeddings:
        assert list(tensor.spec.shape) == [4, job.reference.embedding_width]
        values = np.frombuffer(tensor.data, np.float16).reshape(4, -1).astype(np.float32)
        np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, atol=2e-2)


def test_a_rank_that_does_not_come_is_named_before_the_deadline(speaker):
    job = speaker.create_job(world_size=2)
    keys = fresh_keys(16)
    speaker.submit(job.spec.name, "alone", keys, rank=0, world_size=2)
    with pytest.raises(grpc.RpcError) as caught:
        speaker.select(job.spec.name, "alone", unit_embeddings(16, seed=0), world_size=2, timeout_s=1.5)
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "WAITING_FOR_RANKS")
    assert "[1]" in refusal.message


def test_rows_that_were_never_uploaded_are_told_not_waited_for(speaker):
    job, keys = speaker.create_job(), fresh_keys(16)
    speaker.submit(job.spec.name, "bare", keys)
    with pytest.raises(grpc.RpcError) as caught:
        speaker.select(job.spec.name, "bare", unit_embeddings(16, seed=0))
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REFERENCE_MISSING")
    missing = list(speaker.submit(job.spec.name, "bare", keys).missing_positions)
    speaker.upload(job.spec.name, "bare", missing, features(job, keys))
    assert len(speaker.select(job.spec.name, "bare", unit_embeddings(16, seed=0)).positions) == 4


def test_accounts_balance_while_super_batches_are_in_flight(speaker):
    job = speaker.create_job()
    for i in range(3):
        speaker.walk(job, f"done-{i}", fresh_keys(16))
    for i in range(2):
        speaker.submit(job.spec.name, f"open-{i}", fresh_keys(16))
    account = counters(speaker, job.spec.name)
    assert (account.submitted, account.selected, account.dead_lettered, account.in_flight) == (5, 3, 0, 2)
    assert (account.examples_loaded, account.examples_selected) == (48, 12)
    assert (account.reference_inferences, account.cache_hits) == (48, 0)


def test_more_super_batches_than_the_job_allows_are_told_when_to_come_back(speaker):
    job = speaker.create_job(max_in_flight=2)
    for i in range(2):
        speaker.submit(job.spec.name, f"sb-{i}", fresh_keys(16))
    with pytest.raises(grpc.RpcError) as caught:
        speaker.submit(job.spec.name, "sb-2", fresh_keys(16))
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert refusal.retry_after_s > 0
    assert counters(speaker, job.spec.name).submitted == 2


def test_learner_only_scoring_asks_for_no_features(speaker):
    policy = jobs_pb2.SelectionPolicy(sub_batch_size=4, num_chunks=2, scoring=jobs_pb2.SCORING_HARD_LEARNER)
    job = speaker.create_job(policy=policy)
    keys = fresh_keys(16)
    assert not speaker.submit(job.spec.name, "hard", keys).missing_positions
    assert len(speaker.select(job.spec.name, "hard", unit_embeddings(16, seed=0)).positions) == 4
