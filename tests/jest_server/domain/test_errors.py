import grpc
import pytest
from google.rpc import error_details_pb2

from jest_server.domain import errors
from jest_server.runtime.error_interceptor import status_of


def every_error(root=errors.JestServerError):
    yield root
    for child in root.__subclasses__():
        yield from every_error(child)


def test_the_tree_in_the_docstring_is_the_tree_in_the_code():
    for error in every_error():
        if error is errors.JestServerError:
            continue
        (line,) = [line for line in errors.__doc__.splitlines() if f" {error.__name__} " in line]
        assert line.split()[-2:] == [error.code.name, str(error.http_status)]


def test_every_reason_is_its_own():
    reasons = [e.__dict__["reason"] for e in every_error() if "reason" in e.__dict__]
    assert len(reasons) == len(set(reasons))


def details_of(error):
    status = status_of(error)
    found = {}
    for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
        for detail in status.details:
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    return status, found


def test_a_wrong_field_travels_with_its_name():
    status, details = details_of(errors.InvalidField("rank is 7", {"job": "j"}, field_name="rank"))
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert status.message == "rank is 7"
    assert details["ErrorInfo"].reason == "INVALID_FIELD"
    assert details["ErrorInfo"].domain == "jest.v1"
    assert details["ErrorInfo"].metadata == {"job": "j"}
    assert details["BadRequest"].field_violations[0].field == "rank"
    assert "RetryInfo" not in details


@pytest.mark.parametrize("seconds", [0.0, 0.25, 2.0])
def test_what_should_be_tried_again_says_when(seconds):
    _, details = details_of(errors.QueueFull("full", retry_after_s=seconds))
    assert details["RetryInfo"].retry_delay.ToNanoseconds() == seconds * 1e9
    assert "BadRequest" not in details
