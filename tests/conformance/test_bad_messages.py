"""A bad message harms only its sender: one clear error, nothing changed, and the server goes on."""

import grpc
import numpy as np
import pytest

from conformance.speaker import TIMEOUT_S, features, fresh_keys, refused, unit_embeddings
from jest_proto.v1 import jobs_pb2, selection_pb2, tensors_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def ready(speaker):
    """A job and a super-batch that only lacks its learner outputs."""
    job, keys = speaker.create_job(), fresh_keys(16)
    speaker.submit(job.spec.name, "sb", keys)
    speaker.upload(job.spec.name, "sb", list(range(16)), features(job, keys))
    return job.spec.name, keys


@pytest.fixture(autouse=True)
def nothing_else_changes(speaker, request):
    """After each refusal the super-batch can still be decided, and the server is well."""
    name = request.getfixturevalue("ready")[0] if "ready" in request.fixturenames else None
    yield
    if name:
        assert len(speaker.select(name, "sb", unit_embeddings(16, seed=0)).positions) == 4
        account = speaker.jobs.GetJob(jobs_pb2.GetJobRequest(name=name), timeout=TIMEOUT_S).job.counters
        assert (account.submitted, account.selected, account.in_flight) == (1, 1, 0)
    assert speaker.is_well()


def spoiled(**fields):
    """Changes the header's first tensor announcement."""

    def spoil(messages):
        for name, value in fields.items():
            if name == "shape":
                messages[0].header.tensors[0].shape[:] = value
            else:
                setattr(messages[0].header.tensors[0], name, value)
        return messages

    return spoil


def test_an_unknown_job_is_named(speaker, ready):
    refusal = refused(speaker.submit, "no-such-job", "sb", fresh_keys(16))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "JOB_UNKNOWN")
    assert "no-such-job" in refusal.message
    assert refused(speaker.select, "no-such-job", "sb", unit_embeddings(16, seed=0)).reason == "JOB_UNKNOWN"


@pytest.mark.parametrize("bad", ["", "white space", "x" * 129, "sla/sh"])
def test_an_impossible_super_batch_id_is_refused(speaker, ready, bad):
    refusal = refused(speaker.submit, ready[0], bad, fresh_keys(16))
    assert (refusal.code, refusal.fields) == (INVALID, ["super_batch_id"])


def test_a_super_batch_that_was_never_submitted_is_told(speaker, ready):
    refusal = refused(speaker.select, ready[0], "never", unit_embeddings(16, seed=0))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "SUPER_BATCH_UNKNOWN")
    assert "submit it first" in refusal.message


@pytest.mark.parametrize(("rank", "world_size", "field"), [(0, 2, "world_size"), (1, 1, "rank")])
def test_a_rank_outside_the_job_is_refused(speaker, ready, rank, world_size, field):
    submit = refused(speaker.submit, ready[0], "other", fresh_keys(16), rank=rank, world_size=world_size)
    select = refused(speaker.select, ready[0], "sb", unit_embeddings(16, seed=0), rank=rank, world_size=world_size)
    assert (submit.code, submit.fields) == (select.code, select.fields) == (INVALID, [field])


@pytest.mark.parametrize(
    ("keys", "field", "says"),
    [
        ([], "example_keys", "holds 0 keys"),
        (["a"] * 15 + [""], "example_keys[15]", "is 0 bytes long"),
        (["a"] * 15 + ["b" * 513], "example_keys[15]", "is 513 bytes long"),
        (["a", "b"] * 8, "example_keys", "2 distinct keys"),
        (["a", "b", "c"], "example_keys", "super-batch of 3"),
    ],
)
def test_impossible_keys_are_refused(speaker, ready, keys, field, says):
    refusal = refused(speaker.submit, ready[0], "keys", keys)
    assert (refusal.code, refusal.fields) == (INVALID, [field])
    assert says in refusal.message


def test_the_same_id_with_other_keys_is_a_conflict(speaker, ready):
    refusal = refused(speaker.submit, ready[0], "sb", fresh_keys(16))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "SUPER_BATCH_CONFLICT")
    assert refusal.metadata["super_batch_id"] == "sb"


def test_the_same_rows_with_other_features_are_a_conflict(speaker, ready):
    job = speaker.jobs.GetJob(jobs_pb2.GetJobRequest(name=ready[0]), timeout=TIMEOUT_S).job
    refusal = refused(speaker.upload, ready[0], "sb", list(range(16)), features(job, fresh_keys(16)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "SUPER_BATCH_CONFLICT")


def test_a_decision_is_the_answer_whatever_learner_outputs_come_later(speaker, ready):
    first = speaker.select(ready[0], "sb", unit_embeddings(16, seed=0))
    assert speaker.select(ready[0], "sb", unit_embeddings(16, seed=1)) == first


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_values_that_are_no_numbers_are_refused_with_their_row(speaker, ready, value, which):
    embeddings = unit_embeddings(16, seed=0)
    embeddings[which][5, 3] = value
    refusal = refused(speaker.select, ready[0], "sb", embeddings)
    assert (refusal.code, refusal.fields) == (INVALID, ["embeddings"])
    assert ("image", "text")[which] in refusal.message
    assert "row 5" in refusal.message


@pytest.mark.parametrize(
    ("embeddings", "field"),
    [
        (unit_embeddings(15, seed=0), "tensors[image_embedding].shape"),
        (tuple(m[:, 0] for m in unit_embeddings(16, seed=0)), "tensors[image_embedding].shape"),
        (tuple(m[:, :0] for m in unit_embeddings(16, seed=0)), "tensors[image_embedding].shape"),
        ((unit_embeddings(16, seed=0)[0], unit_embeddings(16, seed=0, width=9)[1]), "tensors[text_embedding]"),
        ((unit_embeddings(16, seed=0)[0], unit_embeddings(16, seed=0, dtype=np.float16)[1]), "tensors[text_embedding]"),
        (tuple(m.astype(np.int32) for m in unit_embeddings(16, seed=0)), "tensors[image_embedding].datatype"),
    ],
)
def test_learner_outputs_of_a_wrong_shape_or_type_are_refused(speaker, ready, embeddings, field):
    refusal = refused(speaker.select, ready[0], "sb", embeddings)
    assert (refusal.code, refusal.fields) == (INVALID, [field])


@pytest.mark.parametrize(
    ("numbers", "field"),
    [
        ({"scale": 0.0}, "embeddings.scale"),
        ({"scale": float("nan")}, "embeddings.scale"),
        ({"bias": float("inf")}, "embeddings.bias"),
    ],
)
def test_an_impossible_scale_or_bias_is_refused(speaker, ready, numbers, field):
    refusal = refused(speaker.select, ready[0], "sb", unit_embeddings(16, seed=0), **numbers)
    assert (refusal.code, refusal.fields) == (INVALID, [field])


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (spoiled(datatype="FP64"), "tensors[image_embedding].datatype"),
        (spoiled(byte_length=7), "tensors[image_embedding].byte_length"),
        (spoiled(name="picture_embedding"), "tensors"),
        (spoiled(shape=[16, -24]), "tensors[image_embedding].shape"),
        (lambda messages: messages[1:], "header"),
        (lambda messages: [messages[0], *messages], "message"),
        (lambda messages: [messages[0], messages[2], messages[1]], "chunk"),
        (lambda messages: [*messages, messages[-1]], "chunk"),
        (lambda messages: messages[:-1], "tensors[text_embedding]"),
        (lambda messages: messages[:0], "header"),
    ],
)
def test_a_broken_stream_is_refused_where_it_breaks(speaker, ready, spoil, field):
    refusal = refused(speaker.select, ready[0], "sb", unit_embeddings(16, seed=0), spoil=spoil)
    assert (refusal.code, refusal.fields) == (INVALID, [field])


def test_bytes_that_changed_on_the_way_are_noticed(speaker, ready):
    refusal = refused(speaker.select, ready[0], "sb", unit_embeddings(16, seed=0), spoil=spoiled(xxh3_64=12345))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "CHECKSUM_MISMATCH")
    assert refusal.retry_after_s is not None


def test_a_message_over_the_limit_is_refused_by_size(speaker, ready):
    limit = speaker.selection.GetServerInfo(selection_pb2.GetServerInfoRequest(), timeout=TIMEOUT_S).max_message_bytes
    huge = selection_pb2.SelectSubBatchRequest(chunk=tensors_pb2.TensorChunk(data=bytes(limit + 1)))
    refusal = refused(
        speaker.select, ready[0], "sb", unit_embeddings(16, seed=0), spoil=lambda messages: [messages[0], huge]
    )
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in refusal.message


def test_tensors_over_the_limit_are_refused_before_a_byte_is_sent(speaker, ready):
    limit = speaker.selection.GetServerInfo(selection_pb2.GetServerInfoRequest(), timeout=TIMEOUT_S).max_tensor_bytes
    width = limit // (16 * 4)

    def announce_much(messages):
        for spec in messages[0].header.tensors:
            spec.shape[:] = [16, width]
            spec.byte_length = 16 * width * 4
        return messages[:1]

    refusal = refused(speaker.select, ready[0], "sb", unit_embeddings(16, seed=0), spoil=announce_much)
    assert (refusal.code, refusal.reason) == (INVALID, "TOO_LARGE")
    assert str(limit) in refusal.message


@pytest.mark.parametrize("positions", [[], [1, 0], [3, 3], [16]])
def test_impossible_positions_are_refused(speaker, positions):
    job, keys = speaker.create_job(), fresh_keys(16)
    speaker.submit(job.spec.name, "sb", keys)
    arrays = {name: array[: len(positions)] for name, array in features(job, keys).items()}
    refusal = refused(speaker.upload, job.spec.name, "sb", positions, arrays)
    assert (refusal.code, refusal.fields) == (INVALID, ["positions"])


def test_features_that_the_reference_model_does_not_take_are_refused(speaker):
    job, keys = speaker.create_job(), fresh_keys(16)
    speaker.submit(job.spec.name, "sb", keys)
    good = features(job, keys)
    name = next(iter(good))
    bad = {
        "tensors": {"something_else": good[name]},
        f"tensors[{name}].datatype": good | {name: good[name].astype(np.int64)},
        f"tensors[{name}].shape": good | {name: np.concatenate([good[name]] * 2, axis=1)},
    }
    for field, arrays in bad.items():
        refusal = refused(speaker.upload, job.spec.name, "sb", list(range(16)), arrays)
        assert (refusal.code, refusal.fields) == (INVALID, [field])


NOT_PROTOBUF = b"\xff\xff\xff"
NESTED = b"\x0b" * 100_000  # a group within a group within a group
OVERSIZED = b"\x0a" + b"\xff\xff\xff\x7f"  # a field of 268 million bytes that does not come


@pytest.mark.parametrize("message", [NOT_PROTOBUF, NESTED, OVERSIZED], ids=["not protobuf", "nested", "cut short"])
@pytest.mark.parametrize("method", ["JobService/CreateJob", "SelectionService/SubmitSuperBatch"])
def test_bytes_that_are_no_message_are_refused(speaker, method, message):
    call = speaker.channel.unary_unary(f"/jest.v1.{method}")
    refusal = refused(call, message, timeout=TIMEOUT_S)
    assert (refusal.code, refusal.reason, refusal.fields) == (INVALID, "INVALID_FIELD", ["message"])


@pytest.mark.parametrize("message", [NOT_PROTOBUF, NESTED, OVERSIZED], ids=["not protobuf", "nested", "cut short"])
@pytest.mark.parametrize("method", ["UploadExamples", "SelectSubBatch"])
def test_bytes_that_are_no_message_end_a_stream(speaker, method, message):
    call = speaker.channel.stream_unary(f"/jest.v1.SelectionService/{method}")
    refusal = refused(call, iter([message]), timeout=TIMEOUT_S)
    assert (refusal.code, refusal.reason, refusal.fields) == (INVALID, "INVALID_FIELD", ["message"])


def test_a_message_over_the_limit_is_not_even_taken_in(speaker):
    info = speaker.selection.GetServerInfo(selection_pb2.GetServerInfoRequest(), timeout=TIMEOUT_S)
    call = speaker.channel.unary_unary("/jest.v1.SelectionService/SubmitSuperBatch")
    refusal = refused(call, bytes(info.max_message_bytes + 1), timeout=TIMEOUT_S)
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(info.max_message_bytes) in refusal.message
