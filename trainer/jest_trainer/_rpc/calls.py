"""The three calls that one rank makes about one super-batch, each repeatable and bounded by a deadline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jest_proto.v1 import selection_pb2 as pb
from jest_trainer._rpc import wire
from jest_trainer.errors import CallSite
from jest_wire.spans import NO_SPAN, SuperBatchSpan
from jest_wire.tensors import chunks, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from jest_core import SelectionPolicy
    from jest_trainer._rpc.channel import Connection
    from jest_trainer._rpc.deadlines import Deadline
    from jest_trainer._rpc.encode_outputs import EncodedOutputs
    from jest_trainer._rpc.features import Array
    from jest_trainer._rpc.wire import StepTimes
    from jest_trainer.results import SubBatch, Submitted


@dataclass(frozen=True, slots=True)
class SuperBatchCalls:
    """Calls of one rank about one super-batch. All raise JestError, and Cancelled if their deadline is cancelled."""

    connection: Connection
    job: str
    world_size: int
    policy: SelectionPolicy
    super_batch_id: str
    rank: int
    span: SuperBatchSpan = NO_SPAN
    """The span of the super-batch's whole life on this rank, the parent of the calls."""

    def submit(
        self,
        keys: Sequence[str],
        deadline: Deadline,
        *,
        step: int,
        group_labels: Sequence[str] = (),
        sources: Sequence[str] = (),
    ) -> Submitted:
        """Register the rank's rows by their example keys, with group labels and sources if there are any."""
        request = pb.SubmitSuperBatchRequest(
            job=self.job,
            super_batch_id=self.super_batch_id,
            rank=self.rank,
            world_size=self.world_size,
            example_keys=keys,
            step=step,
            group_labels=group_labels,
            example_sources=sources,
        )
        answer = self.connection.call(
            lambda stubs: stubs.selection.SubmitSuperBatch,
            lambda: request,
            self._site("SubmitSuperBatch"),
            deadline,
            under=self.span,
        )
        return wire.submitted_from_wire(answer)

    def upload(self, positions: Sequence[int], tensors: Mapping[str, Array], deadline: Deadline) -> int:
        """Send the reference model's inputs for some rows, `[len(positions), ...]` each.

        Returns:
            How many examples were queued for scoring.
        """
        specs, buffers = encode(tensors)
        header = pb.UploadExamplesHeader(
            job=self.job, super_batch_id=self.super_batch_id, rank=self.rank, positions=positions, tensors=specs
        )

        def messages() -> Iterator[pb.UploadExamplesRequest]:
            yield pb.UploadExamplesRequest(header=header)
            for chunk in chunks(buffers):
                yield pb.UploadExamplesRequest(chunk=chunk)

        answer = self.connection.call(
            lambda stubs: stubs.selection.UploadExamples,
            messages,
            self._site("UploadExamples"),
            deadline,
            under=self.span,
        )
        return answer.accepted

    def select(
        self,
        outputs: EncodedOutputs,
        deadline: Deadline,
        *,
        return_reference_embeddings: bool,
        last_step: StepTimes | None = None,
    ) -> SubBatch:
        """Send the learner's outputs and wait for the decision; `last_step` reports where the last step's time went."""
        header = pb.SelectSubBatchHeader(
            job=self.job,
            super_batch_id=self.super_batch_id,
            rank=self.rank,
            world_size=self.world_size,
            return_reference_embeddings=return_reference_embeddings,
            last_step=None if last_step is None else wire.step_times_to_wire(last_step),
        )
        header.MergeFrom(outputs.header)

        def messages() -> Iterator[pb.SelectSubBatchRequest]:
            yield pb.SelectSubBatchRequest(header=header)
            for chunk in outputs.chunks():
                yield pb.SelectSubBatchRequest(chunk=chunk)

        answer = self.connection.call(
            lambda stubs: stubs.selection.SelectSubBatch,
            messages,
            self._site("SelectSubBatch"),
            deadline,
            under=self.span,
        )
        return wire.sub_batch_from_wire(self.super_batch_id, self.policy, answer)

    def _site(self, method: str) -> CallSite:
        return CallSite(method, self.job, self.super_batch_id, self.rank)
