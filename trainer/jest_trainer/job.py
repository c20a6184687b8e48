"""A job on the server, as a training process holds it."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from jest_proto.v1 import jobs_pb2
from jest_trainer._rpc import wire
from jest_trainer._rpc.calls import SuperBatchCalls
from jest_trainer._rpc.deadlines import Cancellation, Deadline
from jest_trainer._rpc.encode_outputs import encode_outputs
from jest_trainer._rpc.features import Array, check_features, parts
from jest_trainer._rpc.keys import label_strings, source_strings
from jest_trainer.errors import CallSite
from jest_trainer.outputs import check_outputs
from jest_wire.spans import NO_SPAN, SuperBatchSpan
from jest_wire.values import seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_trainer._rpc.channel import Connection
    from jest_trainer.outputs import LearnerOutputs
    from jest_trainer.results import Counters, ReferenceModel, SubBatch, Submitted


class Job:
    """One training run's job: made by `Client.create_job`, found by `Client.get_job`.

    `SelectedBatches` drives it. A loop of one's own makes the three raw calls for each super-batch, on every rank and
    under the same id: `submit`, `upload` if rows are missing, `select`. Each may be repeated, is bounded
    by the client's deadline, and raises JestError.

    Attributes:
        name: the job's name.
        policy: how it chooses.
        world_size: ranks that contribute to each super-batch.
        fallback: what happens when the reference embeddings are late.
        reference_timeout_s: when they are late, in seconds.
        reference: the reference model as it was served when this handle was made; None if it was not, and for a job
            without one.
        deadline_s: how long each call may take, in seconds.
    """

    def __init__(self, connection: Connection, message: jobs_pb2.Job, *, deadline_s: float) -> None:
        self._connection = connection
        self.name = message.spec.name
        self.policy = wire.job_policy_from_wire(message.spec)
        self.world_size = message.spec.world_size
        self.fallback = wire.fallback_from_wire(message.spec.fallback) or "fail"
        self.reference_timeout_s = seconds(message.spec.reference_timeout)
        self.reference: ReferenceModel | None = (
            wire.reference_from_wire(message.reference) if message.HasField("reference") else None
        )
        self.deadline_s = deadline_s

    def __repr__(self) -> str:
        return f"Job({self.name!r}, world_size={self.world_size}, server={self._connection.address!r})"

    def counters(self) -> Counters:
        """The job's accounts on the server, now."""
        answer = self._connection.call(
            lambda stubs: stubs.jobs.GetJob,
            lambda: jobs_pb2.GetJobRequest(name=self.name),
            CallSite("GetJob", self.name),
            self.deadline(),
        )
        return wire.counters_from_wire(answer.job.counters)

    def open_attempt(
        self,
        rank: int = 0,
        *,
        launch: str = "",
        parent: str = "",
        parent_step: int | None = None,
        process_nonce: str | None = None,
    ) -> str:
        """Join a new run of this job's training; the answer is the first part of its super-batches' ids.

        Every rank calls it once per start, before its first `submit`; then ids are `{attempt}-{pass}-{step}`.
        `SelectedBatches` does all of this itself.

        Args:
            rank: this one.
            launch: equal on all ranks of this start, and on no other start; empty: the server waits for one process of
                each rank.
            parent: the attempt that this one continues, if it resumes training.
            parent_step: the first step that it makes itself; given with `parent`.
            process_nonce: names this process, so that a call may be repeated; None draws one.

        Raises:
            ValueError: parent and parent_step are not given together.
        """
        if bool(parent) != (parent_step is not None):
            raise ValueError(f"parent ({parent!r}) and parent_step ({parent_step}) must be given together")
        request = jobs_pb2.OpenAttemptRequest(
            job=self.name,
            rank=rank,
            world_size=self.world_size,
            launch=launch,
            process_nonce=process_nonce or secrets.token_hex(16),
            parent=parent,
            parent_step=parent_step,
        )
        answer = self._connection.call(
            lambda stubs: stubs.jobs.OpenAttempt, lambda: request, CallSite("OpenAttempt", self.name), self.deadline()
        )
        return answer.attempt

    def submit(
        self,
        super_batch_id: str,
        keys: Sequence[str],
        rank: int = 0,
        *,
        step: int,
        group_labels: Sequence[str | int | None] | None = None,
        sources: Sequence[str | None] | None = None,
    ) -> Submitted:
        """Register this rank's rows by their example keys; the answer names the rows to upload.

        Args:
            super_batch_id: the same on all ranks: `{attempt}-{pass}-{step}` (see `open_attempt`).
            keys: one for each row.
            rank: this one.
            step: the training step, from 0, the same on all ranks. With the job's seed it seeds the selection.
            group_labels: one for each row, None for a row of no group; must be given if the policy has
                `max_per_group`.
            sources: where each row's example is, for the server to read it itself: `URL.tar#KEY` or the URL of a
                picture; None for a row that is uploaded.

        Raises:
            ValueError: the policy needs labels that are not given, or labels are not one for each row.
        """
        if group_labels is None and self.policy.max_per_group is not None:
            raise ValueError(
                f"group_labels must be given: max_per_group is {self.policy.max_per_group} in job {self.name!r}"
            )
        labels = [] if group_labels is None else label_strings(group_labels, len(keys))
        named = [] if sources is None else source_strings(sources, len(keys))
        return self.calls(super_batch_id, rank).submit(
            keys, self.deadline(), step=step, group_labels=labels, sources=named
        )

    def upload(
        self, super_batch_id: str, positions: Sequence[int], features: Mapping[str, Array], rank: int = 0
    ) -> int:
        """Send the reference model's inputs for the rows at `positions` (ascending).

        Args:
            super_batch_id: as submitted.
            positions: rows, as `submit` named them.
            features: arrays `[len(positions), ...]` by input name: row i belongs to `positions[i]`.
            rank: as submitted.

        Returns:
            How many examples were queued for scoring.

        Raises:
            ValueError: an array has another number of rows.
        """
        check_features(features, len(positions))
        calls, deadline = self.calls(super_batch_id, rank), self.deadline()
        return sum(
            calls.upload(positions[part], tensors, deadline) for part, tensors in parts(features, range(len(positions)))
        )

    def select(
        self, super_batch_id: str, outputs: LearnerOutputs, rank: int = 0, *, return_reference_embeddings: bool = False
    ) -> SubBatch:
        """Send what the learner makes of this rank's rows, in row order, and wait for the decision.

        Raises:
            ValueError: the outputs are not of the kind that the policy's loss wants, or lack what its scoring needs.
        """
        calls = self.calls(super_batch_id, rank)
        checked = check_outputs("outputs", outputs, self.policy, world_size=self.world_size)
        return calls.select(
            encode_outputs(checked, self.policy),
            self.deadline(),
            return_reference_embeddings=return_reference_embeddings,
        )

    def calls(self, super_batch_id: str, rank: int, span: SuperBatchSpan = NO_SPAN) -> SuperBatchCalls:
        """The calls of one rank about one super-batch, for callers that bring their own deadlines, and a span."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank ({rank}) must lie in [0, {self.world_size}), the world of job {self.name!r}")
        return SuperBatchCalls(self._connection, self.name, self.world_size, self.policy, super_batch_id, rank, span)

    def deadline(self, cancellation: Cancellation | None = None) -> Deadline:
        """The client's deadline, beginning now."""
        return Deadline(self.deadline_s, cancellation)
