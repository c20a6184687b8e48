"""The one exception of the SDK, and how it is read from a failed call.

A server's refusal carries google.rpc details (reason, ids, when to retry); what gRPC itself reports (nothing there,
no answer) has none, so the message says on which side the trouble is and what to look at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from jest_wire.values import seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

REFERENCE_MISSING: Final = "REFERENCE_MISSING"
SUPER_BATCH_UNKNOWN: Final = "SUPER_BATCH_UNKNOWN"
SUPER_BATCH_CONFLICT: Final = "SUPER_BATCH_CONFLICT"
DEAD_LETTERED: Final = "DEAD_LETTERED"
# Reasons of the SDK's own: the server never saw the call.
CLIENT_CLOSED: Final = "CLIENT_CLOSED"
FORKED: Final = "FORKED"
BAD_ANSWER: Final = "BAD_ANSWER"

_ALWAYS_TRANSIENT = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS}
_TRANSIENT_WITH_RETRY_INFO = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION}

_TRANSPORT_ADVICE = {
    grpc.StatusCode.UNAVAILABLE: "the server could not be reached; check the address and that it is running",
    grpc.StatusCode.DEADLINE_EXCEEDED: "the server did not answer in time; it may be stopped, overloaded or cut off",
    grpc.StatusCode.UNAUTHENTICATED: "the server wants a valid token; give it as Client(token=...)",
    grpc.StatusCode.PERMISSION_DENIED: "the token does not allow this",
    grpc.StatusCode.UNIMPLEMENTED: "nothing there speaks this version of jest.v1; check the address and the versions",
    grpc.StatusCode.CANCELLED: "the call was cut off before there was an answer",
}


class JestError(Exception):
    """A call to the server failed, or could not be made.

    Attributes:
        reason: why, in a word to branch on: the server's ErrorInfo reason such as `JOB_UNKNOWN`, else `code`'s name.
        code: gRPC status code; None if the call was refused on this side.
        metadata: ids and values that the server named (`job`, `super_batch_id`, `rank`, `field`, ...).
        retry_after_s: when the server suggests to try again, in seconds; the SDK has done so until its deadline.
        field_violations: for a bad request, what is wrong by field.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "UNKNOWN",
        code: grpc.StatusCode | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        field_violations: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.code = code
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.field_violations = dict(field_violations or {})

    @property
    def transient(self) -> bool:
        """Whether the same call may well succeed a little later; a passed deadline is not."""
        if self.code in _ALWAYS_TRANSIENT:
            return True
        return self.code in _TRANSIENT_WITH_RETRY_INFO and self.retry_after_s is not None


@dataclass(frozen=True, slots=True)
class CallSite:
    """Which call it is about; reads as the subject of an error message."""

    method: str
    job: str = ""
    super_batch_id: str = ""
    rank: int | None = None

    def __str__(self) -> str:
        parts = [self.method]
        if self.super_batch_id:
            parts.append(f"of super-batch {self.super_batch_id!r}")
        if self.job:
            parts.append(f"of job {self.job!r}")
        if self.rank is not None:
            parts.append(f"as rank {self.rank}")
        return " ".join(parts)

    def ids(self) -> dict[str, str]:
        """The ids by their names in error metadata."""
        ids = {"job": self.job, "super_batch_id": self.super_batch_id}
        if self.rank is not None:
            ids["rank"] = str(self.rank)
        return {name: value for name, value in ids.items() if value}


def from_rpc(error: grpc.RpcError, site: CallSite, address: str) -> JestError:
    """Read a failed call: the server's own words if it had any, else what the transport's code means."""
    code = error.code()
    info, retry, bad_request = _details(error)
    if info is None:
        advice = _TRANSPORT_ADVICE.get(code, "the server failed without saying why; its log may tell")
        return no_answer(site, address, code, f"{advice} ({error.details()})")
    return JestError(
        f"{site} was refused by {address}: {error.details()} [{code.name}, {info.reason}]",
        reason=info.reason,
        code=code,
        metadata=site.ids() | dict(info.metadata),
        retry_after_s=None if retry is None else seconds(retry.retry_delay),
        field_violations={v.field: v.description for v in bad_request.field_violations} if bad_request else {},
    )


def no_answer(site: CallSite, address: str, code: grpc.StatusCode, what: str) -> JestError:
    """The error of a call that the server did not answer itself."""
    return JestError(
        f"{site} got no answer from {address}: {what} [{code.name}]", reason=code.name, code=code, metadata=site.ids()
    )


def _details(
    error: grpc.RpcError,
) -> tuple[error_details_pb2.ErrorInfo | None, error_details_pb2.RetryInfo | None, error_details_pb2.BadRequest | None]:
    try:
        status = rpc_status.from_call(error)
    except ValueError:
        # Details that contradict the call's own status come from some box on the way; the status is what counts.
        return None, None, None
    found: dict[type, Any] = {}
    for packed in status.details if status is not None else ():
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, error_details_pb2.BadRequest):
            message = kind()
            if packed.Unpack(message):
                found[kind] = message
    return (
        found.get(error_details_pb2.ErrorInfo),
        found.get(error_details_pb2.RetryInfo),
        found.get(error_details_pb2.BadRequest),
    )
