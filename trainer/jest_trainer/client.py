"""The way in: one server, and the jobs on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self, get_args

from jest_proto.v1 import jobs_pb2, selection_pb2
from jest_trainer._loop.distributed import resolve_world_size
from jest_trainer._rpc import wire
from jest_trainer._rpc.channel import Connection
from jest_trainer._rpc.deadlines import Deadline
from jest_trainer.errors import CallSite
from jest_trainer.job import Job
from jest_trainer.outputs import scoring_and_loss
from jest_trainer.results import Fallback
from jest_wire.policies import policy_to_wire
from jest_wire.values import duration

if TYPE_CHECKING:
    from types import TracebackType

    import grpc

    from jest_core import SelectionPolicy
    from jest_trainer.results import ServerInfo


class Client:
    """A JEST server, by its address.

    Nothing is sent before the first call. Threads may share a client. A process that was forked off cannot use one that
    has been used already: it gets a JestError with reason FORKED at once, where gRPC would hang.

    Args:
        address: `host:port` of the selector, or any other name that gRPC can resolve.
        token: sent with every call as `authorization: Bearer ...`; over an untrusted network give `credentials` too.
        deadline_s: how long a call may take, all retries together, in seconds. A selection waits for the slowest rank.
        credentials: TLS, as from `grpc.ssl_channel_credentials()`; None speaks plain text.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        deadline_s: float = 60.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        if not address:
            raise ValueError("address is empty, expected host:port")
        _require_seconds("deadline_s", deadline_s)
        if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
            raise ValueError("token must be printable ASCII without spaces")
        self._connection = Connection(address, token=token, credentials=credentials)
        self._deadline_s = deadline_s

    def __repr__(self) -> str:
        return f"Client({self._connection.address!r}, deadline_s={self._deadline_s:g})"

    def create_job(  # noqa: PLR0913 - a job's whole spec, by keyword and with defaults
        self,
        name: str,
        *,
        policy: SelectionPolicy,
        reference_model: str | None = None,
        seed: int = 0,
        world_size: int | None = None,
        fallback: Fallback = "fail",
        reference_timeout_s: float = 30.0,
        max_in_flight: int = 64,
        super_batch_ttl_s: float = 600.0,
        weight: float = 1.0,
    ) -> Job:
        """Make a job, or find the one that was made with the same spec: every rank may call this.

        Args:
            name: 1 to 128 characters of [A-Za-z0-9._-].
            policy: how to choose.
            reference_model: as Triton serves it; None where the policy needs none, which is under the scorings
                `uniform` and `hard_learner` and under the loss `per_example`.
            seed: of every random choice, together with the step.
            world_size: ranks that contribute to each super-batch; None asks torch.distributed, 1 without it.
            fallback: what to do when reference embeddings are late: `fail`, or choose by another rule and say so.
            reference_timeout_s: when they are late.
            max_in_flight: super-batches that may be undecided at once.
            super_batch_ttl_s: when an undecided super-batch is dead-lettered.
            weight: share of the reference model, relative to other jobs', while they all wait for it.

        Raises:
            ValueError: a value is invalid, or the deadline would come before the fallback.
            JestError: as the contract says: JOB_CONFLICT if the name is taken by another spec, ...
        """
        if fallback not in get_args(Fallback):
            raise ValueError(f"fallback ({fallback!r}) must be one of {', '.join(get_args(Fallback))}")
        if not reference_model and policy.needs_reference_model:
            raise ValueError(
                f"reference_model ({reference_model!r}) must name a model: "
                f"{scoring_and_loss(policy)} needs its embeddings"
            )
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed ({seed}) must lie in [0, 2**64)")
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight ({max_in_flight}) must be at least 1")
        if not 0.001 <= weight <= 1000:
            raise ValueError(f"weight ({weight:g}) must lie in [0.001, 1000]")
        _require_seconds("reference_timeout_s", reference_timeout_s)
        _require_seconds("super_batch_ttl_s", super_batch_ttl_s)
        if fallback != "fail" and reference_timeout_s >= self._deadline_s:
            raise ValueError(
                f"reference_timeout_s ({reference_timeout_s:g}) must be smaller than the client's deadline_s "
                f"({self._deadline_s:g}), or the fallback {fallback!r} never gets its turn"
            )
        spec = jobs_pb2.JobSpec(
            name=name,
            reference_model=reference_model or "",
            policy=policy_to_wire(policy),
            world_size=resolve_world_size(world_size),
            seed=seed,
            fallback=wire.fallback_to_wire(fallback),
            reference_timeout=duration(reference_timeout_s),
            max_in_flight=max_in_flight,
            super_batch_ttl=duration(super_batch_ttl_s),
            weight=weight,
        )
        answer = self._connection.call(
            lambda stubs: stubs.jobs.CreateJob,
            lambda: jobs_pb2.CreateJobRequest(spec=spec),
            CallSite("CreateJob", name),
            Deadline(self._deadline_s),
        )
        return Job(self._connection, answer.job, deadline_s=self._deadline_s)

    def get_job(self, name: str) -> Job:
        """Find a job; JestError with reason JOB_UNKNOWN if there is none."""
        answer = self._connection.call(
            lambda stubs: stubs.jobs.GetJob,
            lambda: jobs_pb2.GetJobRequest(name=name),
            CallSite("GetJob", name),
            Deadline(self._deadline_s),
        )
        return Job(self._connection, answer.job, deadline_s=self._deadline_s)

    def delete_job(self, name: str) -> bool:
        """Delete a job, with its decisions and what it has in flight; cached reference embeddings stay.

        Returns:
            Whether there was one. Also False if a first attempt deleted it and its answer was lost on the way.
        """
        answer = self._connection.call(
            lambda stubs: stubs.jobs.DeleteJob,
            lambda: jobs_pb2.DeleteJobRequest(name=name),
            CallSite("DeleteJob", name),
            Deadline(self._deadline_s),
        )
        return answer.deleted

    def server_info(self) -> ServerInfo:
        """The server's version, limits and abilities."""
        answer = self._connection.call(
            lambda stubs: stubs.selection.GetServerInfo,
            selection_pb2.GetServerInfoRequest,
            CallSite("GetServerInfo"),
            Deadline(self._deadline_s),
        )
        return wire.info_from_wire(answer)

    def close(self) -> None:
        """Close the connection; its jobs become unusable."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _require_seconds(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} ({value}) must be a finite number of seconds larger than 0")
