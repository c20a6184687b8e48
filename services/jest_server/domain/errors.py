"""Every error a caller can meet, as one tree, and the one table that turns each into a gRPC and an HTTP status.

JestServerError
├── InvalidField          a value in the request is wrong           INVALID_ARGUMENT    400
│   └── TooLarge          a declared size is over a limit            INVALID_ARGUMENT    413
├── Unauthenticated       no token that is valid here                UNAUTHENTICATED     401
│   ├── TokenMissing      none at all                                UNAUTHENTICATED     401
│   └── TokenExpired      one that was valid once                    UNAUTHENTICATED     401
├── ChecksumMismatch      bytes changed on the way                   DATA_LOSS           400
├── JobUnknown            no such job                                NOT_FOUND           404
├── SuperBatchUnknown     never submitted, or long forgotten         NOT_FOUND           404
├── AttemptUnknown        no such attempt of the job                 NOT_FOUND           404
├── AttemptSuperseded     a newer process opened the next attempt    FAILED_PRECONDITION 409
├── DeadLetterUnknown     none of this super-batch                   NOT_FOUND           404
├── NotKept               it was there, for a limited time           FAILED_PRECONDITION 409
├── Conflict              the same id with other content             ALREADY_EXISTS      409
│   └── JobConflict       the name is taken by another job spec      ALREADY_EXISTS      409
├── QueueFull             a limit on what is in flight               RESOURCE_EXHAUSTED  429
├── RateLimited           more calls in a second than allowed        RESOURCE_EXHAUSTED  429
├── ReferenceMissing      rows without reference embeddings          FAILED_PRECONDITION 409
├── ReferenceUnavailable  no scorer serves the reference model       FAILED_PRECONDITION 409
├── ReferenceTimeout      embeddings late, fallback is "fail"        UNAVAILABLE         503
├── WaitTimeout           the caller's deadline came first           DEADLINE_EXCEEDED   504
├── DeadLettered          the super-batch was dead-lettered          ABORTED             410
├── StoreUnavailable      the queue or the cache does not answer     UNAVAILABLE         503
└── Stopping              this process is going away                 UNAVAILABLE         503
"""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc


@dataclass(eq=False)
class JestServerError(Exception):
    """What is wrong, for whom, and what to do; ``metadata`` carries the ids, and the limit that was reached, if any."""

    message: str
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None

    code = grpc.StatusCode.INTERNAL
    http_status = 500
    reason = "INTERNAL"

    def __str__(self) -> str:
        return self.message

    @property
    def limit(self) -> str:
        """The setting whose limit was reached; "none" for what is no limit."""
        return self.metadata.get("limit", "none")


@dataclass(eq=False)
class InvalidField(JestServerError):
    """``field_name`` holds a value that cannot be; the message tells value and expectation."""

    field_name: str = ""

    code = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400
    reason = "INVALID_FIELD"


class TooLarge(InvalidField):
    """A declared size is over a limit, found before anything was allocated for it."""

    http_status = 413
    reason = "TOO_LARGE"


class Unauthenticated(JestServerError):
    """Whoever calls showed no token that is valid here."""

    code = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401
    reason = "TOKEN_INVALID"


class TokenMissing(Unauthenticated):
    """A token is asked for, and there was none."""

    reason = "TOKEN_MISSING"


class TokenExpired(Unauthenticated):
    """The token was valid once."""

    reason = "TOKEN_EXPIRED"


class ChecksumMismatch(JestServerError):
    """The bytes that arrived are not those that were announced."""

    code = grpc.StatusCode.DATA_LOSS
    http_status = 400
    reason = "CHECKSUM_MISMATCH"


class JobUnknown(JestServerError):
    """There is no job of this name."""

    code = grpc.StatusCode.NOT_FOUND
    http_status = 404
    reason = "JOB_UNKNOWN"


class SuperBatchUnknown(JestServerError):
    """This super-batch, or this rank's share of it, was never submitted or is forgotten."""

    code = grpc.StatusCode.NOT_FOUND
    http_status = 404
    reason = "SUPER_BATCH_UNKNOWN"


class Conflict(JestServerError):
    """The same ids came before with other content; nothing was changed."""

    code = grpc.StatusCode.ALREADY_EXISTS
    http_status = 409
    reason = "SUPER_BATCH_CONFLICT"


class JobConflict(Conflict):
    """The job exists with another spec."""

    reason = "JOB_CONFLICT"


class QueueFull(JestServerError):
    """A limit on what may be in flight is reached; come back after ``retry_after_s``."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    reason = "QUEUE_FULL"


class RateLimited(JestServerError):
    """More calls in a second than the job, the tenant or all together may make; come back after ``retry_after_s``."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    reason = "RATE_LIMITED"


class ReferenceMissing(JestServerError):
    """Rows have neither cached nor computed reference embeddings: submit again and upload what is named."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409
    reason = "REFERENCE_MISSING"


class ReferenceUnavailable(JestServerError):
    """No scorer announces this reference model at the moment."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409
    reason = "REFERENCE_UNAVAILABLE"


class ReferenceTimeout(JestServerError):
    """The reference embeddings did not come within the job's reference_timeout, and its fallback is to fail."""

    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    reason = "REFERENCE_TIMEOUT"


class AttemptUnknown(JestServerError):
    """The job has no attempt of this name."""

    code = grpc.StatusCode.NOT_FOUND
    http_status = 404
    reason = "ATTEMPT_UNKNOWN"


class AttemptSuperseded(JestServerError):
    """A newer process of a rank has opened the job's next attempt; this process belongs to an earlier one."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409
    reason = "ATTEMPT_SUPERSEDED"


class DeadLetterUnknown(JestServerError):
    """There is no dead letter of this super-batch."""

    code = grpc.StatusCode.NOT_FOUND
    http_status = 404
    reason = "DEAD_LETTER_UNKNOWN"


class NotKept(JestServerError):
    """What is asked for was there once, and is kept for a limited time only."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409
    reason = "NOT_KEPT"


@dataclass(eq=False)
class WaitTimeout(JestServerError):
    """The caller's deadline came before what it waits for; ``reason`` says for whom."""

    reason: str = "WAITING_FOR_REFERENCE"

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504


class DeadLettered(JestServerError):
    """The super-batch was dead-lettered and will never get a decision."""

    code = grpc.StatusCode.ABORTED
    http_status = 410
    reason = "DEAD_LETTERED"


class StoreUnavailable(JestServerError):
    """The queue or the cache does not answer."""

    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    reason = "STORE_UNAVAILABLE"


class Stopping(JestServerError):
    """This process is going away; the same call elsewhere or a little later works."""

    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    reason = "STOPPING"


class ReferenceModelError(Exception):
    """The reference model refused or failed an inference.

    `retryable`: trying again can help. `divisible`: a part of the same examples may work, because the failure can be
    the fault of some of them.
    """

    def __init__(self, message: str, *, retryable: bool, divisible: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.divisible = divisible


class UnreadableSource(Exception):
    """An example that was named by reference cannot be had; ``reason`` is a constant, the message tells the rest."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
