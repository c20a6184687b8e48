"""Between the contract's messages and the SDK's values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from google.protobuf.duration_pb2 import Duration

from jest_proto.tensors import Assembler, TensorError, as_torch
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

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jest_core import SelectionPolicy

IMAGE, TEXT = "image_embedding", "text_embedding"


def policy_to_wire(policy: SelectionPolicy) -> jobs_pb2.SelectionPolicy:
    """Render a policy with every field set, so that no default has to agree on both sides."""
    message = jobs_pb2.SelectionPolicy(
        scoring=jobs_pb2.Scoring.Value(f"SCORING_{policy.scoring.upper()}"),
        loss=jobs_pb2.Loss.Value(f"LOSS_{policy.loss.upper()}"),
        num_chunks=policy.num_chunks,
        gain=policy.gain,
        normalization=jobs_pb2.Normalization.Value(f"NORMALIZATION_{policy.normalization.upper()}"),
        sampler=jobs_pb2.Sampler.Value(f"SAMPLER_{policy.sampler.upper()}"),
        placement=jobs_pb2.Placement.Value(f"PLACEMENT_{policy.placement.upper()}"),
    )
    if policy.sub_batch_size is not None:
        message.sub_batch_size = policy.sub_batch_size
    else:
        message.filter_ratio = str(
            policy.filter_ratio
        )  # the shortest decimal that means this number: 0.8, not 0.8000…4
    return message


def fallback_to_wire(fallback: str) -> jobs_pb2.Fallback.ValueType:
    """Render a fallback's name."""
    return jobs_pb2.Fallback.Value(f"FALLBACK_{fallback.upper()}")


def fallback_from_wire(value: jobs_pb2.Fallback.ValueType) -> str | None:
    """Read a fallback's name; unset is None."""
    return None if value == jobs_pb2.FALLBACK_UNSPECIFIED else _lower(jobs_pb2.Fallback, value)


def duration(seconds: float) -> Duration:
    """Render seconds."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def seconds(message: Duration) -> float:
    """Read seconds."""
    return message.ToNanoseconds() / 1e9


def reference_from_wire(message: jobs_pb2.ReferenceModel) -> ReferenceModel:
    """Read what is known of a reference model."""
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
    """Read a job's accounts."""
    return Counters(**{name: getattr(message, name) for name in Counters.__slots__})


def info_from_wire(message: selection_pb2.GetServerInfoResponse) -> ServerInfo:
    """Read a server's description of itself."""
    return ServerInfo(
        version=message.version,
        scorings=tuple(_lower(jobs_pb2.Scoring, value) for value in message.scorings),
        losses=tuple(_lower(jobs_pb2.Loss, value) for value in message.losses),
        learner_datatypes=tuple(message.learner_datatypes),
        max_rows_per_rank=message.max_rows_per_rank,
        max_tensor_bytes=message.max_tensor_bytes,
        max_message_bytes=message.max_message_bytes,
        max_world_size=message.max_world_size,
    )


def submitted_from_wire(message: selection_pb2.SubmitSuperBatchResponse) -> Submitted:
    """Read the answer to a submission."""
    return Submitted(tuple(message.missing_positions), reference_from_wire(message.reference), message.decided)


def sub_batch_from_wire(super_batch_id: str, message: selection_pb2.SelectSubBatchResponse) -> SubBatch:
    """Read a decision.

    Raises:
        JestError: Its tensors are not what they announce.
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
    )


def _embeddings_from_wire(super_batch_id: str, tensors: Sequence[tensors_pb2.Tensor]) -> ReferenceEmbeddings | None:
    if not tensors:
        return None
    try:
        found = _tensors_from_wire(tensors)
        return ReferenceEmbeddings(found[IMAGE], found[TEXT])
    except (TensorError, KeyError) as error:
        raise JestError(
            f"the reference embeddings in the answer for super-batch {super_batch_id!r} cannot be read: {error}",
            reason=BAD_ANSWER,
            metadata={"super_batch_id": super_batch_id},
        ) from error


def _tensors_from_wire(tensors: Iterable[tensors_pb2.Tensor]) -> dict[str, torch.Tensor]:
    """Checks sizes and checksums as for streamed tensors; the answer as a whole was bounded by the channel."""
    tensors = list(tensors)
    assembler = Assembler([tensor.spec for tensor in tensors], max_bytes=sum(len(tensor.data) for tensor in tensors))
    for index, tensor in enumerate(tensors):
        if tensor.data:
            assembler.add(tensors_pb2.TensorChunk(tensor_index=index, data=tensor.data))
    pairs = zip(tensors, assembler.finish(), strict=True)
    return {tensor.spec.name: as_torch(tensor.spec, data) for tensor, data in pairs}


def _lower(enum: Any, value: int) -> str:
    """The contract's name without its prefix: SCORING_HARD_LEARNER is hard_learner. Unknown ones keep their number."""
    if value not in enum.values():
        return str(value)
    prefix = enum.DESCRIPTOR.name.upper() + "_"
    return str(enum.Name(value).removeprefix(prefix).lower())
