"""The contract's messages to the SDK's values and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from jest_proto.v1 import jobs_pb2, selection_pb2, tensors_pb2
from jest_trainer.errors import BAD_ANSWER, JestError
from jest_trainer.results import (
    Counters,
    ReferenceEmbeddings,
    ReferenceInput,
    ReferenceModel,
    ServerInfo,
    StageTimings,
    SubBatch,
    Submitted,
)
from jest_wire.learner_outputs import IMAGE_EMBEDDING, TEXT_EMBEDDING
from jest_wire.policies import policy_from_wire
from jest_wire.tensors import Assembler, TensorError, as_torch
from jest_wire.values import duration, enum_name_or_number, enum_value, seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jest_core import SelectionPolicy


class StepTimes(NamedTuple):
    """Where the seconds of one training step went; the contract's StepTimes defines each."""

    load: float
    embed: float
    select: float
    train: float


def fallback_to_wire(fallback: str) -> jobs_pb2.Fallback.ValueType:
    """Return a fallback's enum value."""
    value: jobs_pb2.Fallback.ValueType = enum_value(jobs_pb2.Fallback, fallback)
    return value


def fallback_from_wire(value: jobs_pb2.Fallback.ValueType) -> str | None:
    """Return a fallback's name; None if unset."""
    return None if value == jobs_pb2.FALLBACK_UNSPECIFIED else enum_name_or_number(jobs_pb2.Fallback, value)


def step_times_to_wire(times: StepTimes) -> selection_pb2.StepTimes:
    """Return the message of one step's times."""
    return selection_pb2.StepTimes(**{name: duration(value) for name, value in times._asdict().items()})


def reference_from_wire(message: jobs_pb2.ReferenceModel) -> ReferenceModel:
    """Return what is known of a reference model."""
    return ReferenceModel(
        name=message.name,
        version=message.version,
        preprocessing_id=message.preprocessing_id,
        scale=message.scale,
        bias=message.bias,
        embedding_width=message.embedding_width,
        inputs=tuple(ReferenceInput(i.name, i.datatype, tuple(i.shape)) for i in message.inputs),
    )


def counters_from_wire(message: jobs_pb2.JobCounters) -> Counters:
    """Return a job's accounts."""
    return Counters(**{name: getattr(message, name) for name in Counters.__slots__})


def info_from_wire(message: selection_pb2.GetServerInfoResponse) -> ServerInfo:
    """Return a server's description of itself."""
    return ServerInfo(
        version=message.version,
        scorings=tuple(enum_name_or_number(jobs_pb2.Scoring, value) for value in message.scorings),
        losses=tuple(enum_name_or_number(jobs_pb2.Loss, value) for value in message.losses),
        learner_datatypes=tuple(message.learner_datatypes),
        max_rows_per_rank=message.max_rows_per_rank,
        max_tensor_bytes=message.max_tensor_bytes,
        max_message_bytes=message.max_message_bytes,
        max_world_size=message.max_world_size,
        max_pair_loss_bytes=message.max_pair_loss_bytes,
        precisions=tuple(enum_name_or_number(jobs_pb2.Precision, value) for value in message.precisions),
    )


def submitted_from_wire(message: selection_pb2.SubmitSuperBatchResponse) -> Submitted:
    """Return the answer to a submission."""
    reference = reference_from_wire(message.reference) if message.HasField("reference") else None
    return Submitted(tuple(message.missing_positions), reference, message.decided)


def sub_batch_from_wire(
    super_batch_id: str, policy: SelectionPolicy, message: selection_pb2.SelectSubBatchResponse
) -> SubBatch:
    """Return a decision of a job with this policy.

    Raises:
        JestError: Its tensors are not what they announce, or weights are not one for each row.
    """
    return SubBatch(
        super_batch_id=super_batch_id,
        positions=torch.tensor(message.positions, dtype=torch.int64),
        sub_batch_size=message.sub_batch_size,
        super_batch_size=message.super_batch_size,
        reference_version=message.reference_version,
        cache_hits=message.cache_hits,
        reference_inferences=message.reference_inferences,
        perplexity=tuple(message.perplexity),
        timings=StageTimings(**{name: seconds(getattr(message.timings, name)) for name in StageTimings.__slots__}),
        fallback=fallback_from_wire(message.fallback),
        fallback_reason=message.fallback_reason,
        reference_embeddings=_embeddings_from_wire(super_batch_id, message.reference_embeddings),
        weights=_weights_from_wire(super_batch_id, message) if policy.weights else None,
        gain=message.gain,
    )


def job_policy_from_wire(spec: jobs_pb2.JobSpec) -> SelectionPolicy:
    """Return a job's policy.

    Raises:
        JestError: This version does not know a value of it: the job was made by another one.
    """
    try:
        return policy_from_wire(spec.policy)
    except ValueError as error:
        raise JestError(
            f"the policy of job {spec.name!r} cannot be read, it may need a newer version of this package: {error}",
            reason=BAD_ANSWER,
            metadata={"job": spec.name},
        ) from error


def _weights_from_wire(super_batch_id: str, message: selection_pb2.SelectSubBatchResponse) -> torch.Tensor:
    if len(message.weights) != len(message.positions):
        raise JestError(
            f"the answer for super-batch {super_batch_id!r} has {len(message.weights)} weights for "
            f"{len(message.positions)} positions, expected one for each",
            reason=BAD_ANSWER,
            metadata={"super_batch_id": super_batch_id},
        )
    return torch.tensor(message.weights, dtype=torch.float32)


def _embeddings_from_wire(super_batch_id: str, tensors: Sequence[tensors_pb2.Tensor]) -> ReferenceEmbeddings | None:
    if not tensors:
        return None
    try:
        found = _tensors_from_wire(tensors)
        return ReferenceEmbeddings(found[IMAGE_EMBEDDING], found[TEXT_EMBEDDING])
    except (TensorError, KeyError) as error:
        raise JestError(
            f"the reference embeddings in the answer for super-batch {super_batch_id!r} cannot be read: {error}",
            reason=BAD_ANSWER,
            metadata={"super_batch_id": super_batch_id},
        ) from error


def _tensors_from_wire(tensors: Iterable[tensors_pb2.Tensor]) -> dict[str, torch.Tensor]:
    """Check sizes and checksums as for streamed tensors; the answer as a whole was bounded by the channel."""
    tensors = list(tensors)
    assembler = Assembler([tensor.spec for tensor in tensors], max_bytes=sum(len(tensor.data) for tensor in tensors))
    for index, tensor in enumerate(tensors):
        if tensor.data:
            assembler.add(tensors_pb2.TensorChunk(tensor_index=index, data=tensor.data))
    pairs = zip(tensors, assembler.finish(), strict=True)
    return {tensor.spec.name: as_torch(tensor.spec, data) for tensor, data in pairs}
