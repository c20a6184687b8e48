"""One server's gRPC channel: opened by the first call, never shared with a forked child, all calls bounded and retried.

Retries are done here and not by gRPC: its own silently stop at requests of 256 KiB, and they know nothing of RetryInfo.
"""

from __future__ import annotations

import logging
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc
import tenacity

from jest_proto.v1 import jobs_pb2_grpc, selection_pb2_grpc
from jest_trainer._rpc.deadlines import Cancelled
from jest_trainer.errors import CLIENT_CLOSED, FORKED, CallSite, JestError, from_rpc, no_answer
from jest_wire import tracing
from jest_wire.spans import NO_SPAN, SuperBatchSpan

if TYPE_CHECKING:
    from collections.abc import Callable

    from jest_trainer._rpc.deadlines import Deadline

_log = logging.getLogger(__name__)

_GRACE_S = 0.5
"""How long after its deadline a call is given up even if gRPC does not.

gRPC's own deadline is not kept after a fork, nor (by some ten seconds) once a stopped server's receive window is full.
"""
_LARGEST_ANSWER_BYTES = 512 << 20
"""Reference embeddings come back in one message; everything else is small."""
_OPTIONS = (
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # A restarted server is found again within two seconds; gRPC's own backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", _LARGEST_ANSWER_BYTES),
)
_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 2.0

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Request_contra = TypeVar("Request_contra", contravariant=True)


class Method(Protocol[Request_contra, Answer]):
    """A method of a generated stub: unary, or client-streaming with an iterator as its request."""

    def future(
        self,
        request: Request_contra,
        /,
        timeout: float | None = None,
        metadata: tuple[tuple[str, str], ...] | None = None,
    ) -> grpc.Future[Answer]:
        """Start a call."""


@dataclass(frozen=True)
class Stubs:
    """The channel and the services on it."""

    channel: grpc.Channel
    jobs: jobs_pb2_grpc.JobServiceStub
    selection: selection_pb2_grpc.SelectionServiceStub


class Connection:
    """Makes calls to one address. Threads may share it; processes may not."""

    def __init__(self, address: str, *, token: str | None, credentials: grpc.ChannelCredentials | None) -> None:
        self.address = address
        self._metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
        self._credentials = credentials
        self._closed = False
        if os.environ.get("JEST_TRACING", "").lower() in {"1", "true", "yes", "on"}:
            tracing.start("jest-trainer")
        # By process id. A dictionary and no lock: a lock that another thread holds at a fork stays locked in the child.
        self._opened: dict[int, Stubs] = {}

    def call(
        self,
        pick: Callable[[Stubs], Method[Request, Answer]],
        request: Callable[[], Request],
        site: CallSite,
        deadline: Deadline,
        *,
        under: SuperBatchSpan = NO_SPAN,
    ) -> Answer:
        """Call until there is an answer, a final error or no time left.

        Args:
            pick: the method to call, out of the stubs.
            request: makes the message, or the iterator of messages, anew for every attempt.
            site: what the call is about, for errors.
            deadline: bounds all attempts and the pauses between them.
            under: the span that the call is a part of.

        Raises:
            JestError: The last attempt's error.
            Cancelled: The deadline's cancellation was called.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, JestError) and error.transient),
            wait=_pause_s,
            stop=lambda state: state.upcoming_sleep >= deadline.remaining(),
            sleep=deadline.cancellation.sleep,
            before_sleep=_log_retry,
            reraise=True,
        )
        try:
            with tracing.call_span(site.method, site.job, site.super_batch_id, site.rank, under) as span:
                try:
                    answer: Answer = retrying(self._attempt, pick, request, site, deadline)
                finally:
                    if span is not None:
                        span.set_attribute("jest.attempts", retrying.statistics["attempt_number"])
        except JestError as error:
            attempts = retrying.statistics["attempt_number"]
            if attempts > 1:
                error.add_note(f"{attempts} attempts were made within the deadline of {deadline.seconds:g} s.")
            raise
        return answer

    def close(self) -> None:
        """Close the channel for good; calls in flight fail. In a forked child there is nothing to close."""
        self._closed = True
        stubs = self._opened.get(os.getpid())
        if stubs is not None:
            stubs.channel.close()

    def _attempt(
        self,
        pick: Callable[[Stubs], Method[Request, Answer]],
        request: Callable[[], Request],
        site: CallSite,
        deadline: Deadline,
    ) -> Answer:
        timeout_s = deadline.remaining()
        metadata = (*self._metadata, (tracing.HEADER, tracing.traceparent())) if tracing.on() else self._metadata
        call = pick(self._open(site)).future(request(), timeout=timeout_s, metadata=metadata)
        try:
            with deadline.cancellation.watching(call):
                return call.result(timeout_s + _GRACE_S)
        except grpc.FutureTimeoutError:
            raise no_answer(
                site, self.address, grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing within {deadline.seconds:g} s"
            ) from None
        except grpc.FutureCancelledError:
            raise Cancelled from None
        except grpc.RpcError as error:
            raise from_rpc(error, site, self.address) from error

    def _open(self, site: CallSite) -> Stubs:
        if self._closed:
            raise JestError(f"{site} was not made: the client is closed", reason=CLIENT_CLOSED, metadata=site.ids())
        process = os.getpid()
        stubs = self._opened.get(process)
        if stubs is not None:
            return stubs
        if self._opened:
            raise forked(str(site), next(iter(self._opened)))
        channel = self._channel()
        stubs = Stubs(channel, jobs_pb2_grpc.JobServiceStub(channel), selection_pb2_grpc.SelectionServiceStub(channel))
        kept = self._opened.setdefault(process, stubs)
        if kept is not stubs:  # another thread was faster
            channel.close()
        return kept

    def _channel(self) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(self.address, _OPTIONS)
        return grpc.secure_channel(self.address, self._credentials, _OPTIONS)


def forked(what: str, owner: int) -> JestError:
    """The refusal to go on in a forked child, where inherited gRPC channels and threads do not work."""
    return JestError(
        f"{what} was not made: this client belongs to process {owner} and was inherited by process {os.getpid()} "
        "through a fork, where gRPC calls hang; make a Client in the process that uses it",
        reason=FORKED,
    )


def _pause_s(state: tenacity.RetryCallState) -> float:
    """The server's own wish if it has one, else exponential backoff; jitter keeps ranks from coming back in step."""
    backoff_s = min(_FIRST_BACKOFF_S * 2 ** (state.attempt_number - 1), _LONGEST_BACKOFF_S)
    error = _error(state)
    return (error.retry_after_s or backoff_s) * random.uniform(1.0, 1.5)  # noqa: S311 - not a secret


def _log_retry(state: tenacity.RetryCallState) -> None:
    error = _error(state)
    first_failure = state.attempt_number == 1 and error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED
    level = logging.WARNING if first_failure else logging.DEBUG
    _log.log(level, "trying again in %.2f s: %s", state.upcoming_sleep, error)


def _error(state: tenacity.RetryCallState) -> JestError:
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, JestError)
    return error
