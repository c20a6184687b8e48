from __future__ import annotations

import pickle

import grpc
import pytest
from google.rpc import status_pb2
from scripted_server import fail

import jest_trainer as jest

Code = grpc.StatusCode


def refused(server, client, action):
    server.script["GetServerInfo"].append(action)
    with pytest.raises(jest.JestError) as caught:
        client.server_info()
    return caught.value


def test_a_refusal_carries_reason_code_metadata_and_the_server_s_words(server, client):
    error = refused(
        server, client, fail(Code.NOT_FOUND, "JOB_UNKNOWN", "job 'x' does not exist", metadata={"job": "x"})
    )
    assert (error.reason, error.code, error.metadata) == ("JOB_UNKNOWN", Code.NOT_FOUND, {"job": "x"})
    assert error.retry_after_s is None
    assert str(error) == (
        f"GetServerInfo was refused by {server.address}: job 'x' does not exist [NOT_FOUND, JOB_UNKNOWN]"
    )


def test_field_violations_are_told_by_field(server, client):
    violations = {"spec.name": "is ''", "spec.seed": "is -1"}
    error = refused(server, client, fail(Code.INVALID_ARGUMENT, "INVALID_FIELD", violations=violations))
    assert error.field_violations == violations


def test_the_message_names_method_super_batch_job_and_rank(server, job):
    server.script["SubmitSuperBatch"].append(fail(Code.INVALID_ARGUMENT, "INVALID_FIELD", "bad"))
    with pytest.raises(jest.JestError, match="SubmitSuperBatch of super-batch '7' of job 'run-1' as rank 0") as caught:
        job.submit("7", ["a"], step=0)
    assert caught.value.metadata == {"job": "run-1", "super_batch_id": "7", "rank": "0"}


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (Code.UNAUTHENTICATED, "valid token"),
        (Code.UNIMPLEMENTED, "check the address and the versions"),
        (Code.INTERNAL, "its log may tell"),
        (Code.UNKNOWN, "its log may tell"),
    ],
)
def test_an_error_without_details_gets_advice_and_its_code_as_reason(server, client, code, advice):
    error = refused(server, client, fail(code, message="hm"))
    assert (error.reason, error.code) == (code.name, code)
    assert advice in str(error)
    assert "hm" in str(error)
    assert server.address in str(error)


@pytest.mark.parametrize("message", ["no", "yes"])
def test_details_that_contradict_the_status_are_not_believed(server, client, message):
    def act(context):
        status = status_pb2.Status(code=Code.NOT_FOUND.value[0], message=message)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(Code.INTERNAL if message == "no" else Code.NOT_FOUND, "no")

    assert refused(server, client, act).reason in ("INTERNAL", "NOT_FOUND")


@pytest.mark.parametrize(
    ("code", "retry_after_s", "transient"),
    [
        (Code.UNAVAILABLE, None, True),
        (Code.DATA_LOSS, None, True),
        (Code.RESOURCE_EXHAUSTED, None, False),
        (Code.RESOURCE_EXHAUSTED, 0.0, True),
        (Code.FAILED_PRECONDITION, None, False),
        (Code.FAILED_PRECONDITION, 1.0, True),
        (Code.DEADLINE_EXCEEDED, 1.0, False),
        (Code.ABORTED, None, False),
        (Code.INVALID_ARGUMENT, 1.0, False),
        (None, None, False),
    ],
)
def test_which_errors_may_pass(code, retry_after_s, transient):
    assert jest.JestError("x", code=code, retry_after_s=retry_after_s).transient is transient


def test_an_error_crosses_process_borders_whole():
    error = jest.JestError("x", reason="R", code=Code.ABORTED, metadata={"job": "j"}, retry_after_s=1.5)
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), vars(back)) == (str(error), vars(error))
