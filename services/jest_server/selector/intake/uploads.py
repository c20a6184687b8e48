"""Takes uploads of features: checked before and after they are received, cut into shards, and queued for scorers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jest_server.domain.errors import Conflict, InvalidField
from jest_server.domain.shards import Shard
from jest_server.domain.super_batches import RankRef, UploadStatus
from jest_server.selector.not_in_flight import not_in_flight_error
from jest_server.selector.tensor_stream import announced_bytes, receive_tensors
from jest_server.stores import blobs
from jest_wire import tracing
from jest_wire.tensors import as_numpy, content_digest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractContextManager

    from jest_proto.v1 import tensors_pb2
    from jest_server.domain.ports import DecisionLog, SuperBatchStore
    from jest_server.domain.references import ReferenceInfo
    from jest_server.runtime.settings import SelectorSettings
    from jest_server.selector.intake.quotas import Quotas
    from jest_server.use_cases.jobs import JobRegistry
    from jest_wire.tensors import Bytes

    Receiving = Callable[[int, dict[str, str]], AbstractContextManager[None]]


@dataclass(frozen=True)
class UploadRequest(RankRef):
    """The features that a rank announces of some of its rows."""

    positions: tuple[int, ...]
    specs: Sequence[tensors_pb2.TensorSpec]


class UploadExamples:
    """Queues the features of a rank's rows for scoring."""

    def __init__(
        self,
        super_batches: SuperBatchStore,
        decisions: DecisionLog,
        jobs: JobRegistry,
        quotas: Quotas,
        settings: SelectorSettings,
        receiving: Receiving,
    ) -> None:
        """Use `receiving` to count what is being received against the memory of this process."""
        self._super_batches = super_batches
        self._decisions = decisions
        self._jobs = jobs
        self._quotas = quotas
        self._settings = settings
        self._receiving = receiving

    async def run(self, request: UploadRequest, messages: AsyncIterator[Any]) -> int:
        """Receive the features and queue them; return how many examples were accepted, all of them or none.

        Raises:
            InvalidField: If positions, names, datatypes or shapes are not what the reference model needs.
            ChecksumMismatch: If bytes changed on the way.
            SuperBatchUnknown: If the rank did not submit this super-batch, or it is forgotten.
            Conflict: If some of the rows were uploaded before with other content.
            QueueFull: If features of as many bytes as there may be wait for scorers, or there is no memory for them.
            DeadLettered: If the super-batch was dead-lettered.
        """
        limit = self._settings.max_tensor_bytes
        nbytes = announced_bytes(request.specs, max_bytes=limit)
        await self._quotas.require_room(request.ref.job, nbytes, request.ref.metadata)
        with self._receiving(nbytes, request.ref.metadata):
            buffers = await receive_tensors(request.specs, messages, max_bytes=limit)
            return await self._queue(request, buffers)

    async def _queue(self, request: UploadRequest, buffers: Sequence[Bytes]) -> int:
        ref, rank, positions = request.ref, request.rank, request.positions
        digest = content_digest(request.specs, positions)
        super_batch = await self._super_batches.get_super_batch(ref)
        submission = super_batch.submissions.get(rank) if super_batch else None
        if super_batch is None or submission is None:
            return await self._upload_without_super_batch(request)
        reference = super_batch.reference
        if reference is None:
            raise InvalidField(
                f"job {ref.job!r} has no reference model: expected no uploads", request.metadata, field_name="job"
            )
        check_upload(request, len(submission.keys), reference)
        earlier = super_batch.uploads.get(rank, {})
        clash = {p for d, uploaded in earlier.items() if d != digest for p in uploaded} & set(positions)
        if clash:
            raise Conflict(f"positions {sorted(clash)[:5]} were uploaded before with other content", request.metadata)
        shard_examples = self._settings.shard_examples
        status = await self._super_batches.add_upload(
            ref,
            rank,
            digest=digest,
            positions=positions,
            limits=self._quotas.features,
            shards=await asyncio.to_thread(
                shards_of_upload, request, buffers, submission.keys, reference, digest, shard_examples=shard_examples
            ),
        )
        if status is UploadStatus.GONE:
            return await self._upload_without_super_batch(request)
        self._quotas.require_accepted(status, ref.job, request.metadata)
        return len(positions)

    async def _upload_without_super_batch(self, request: UploadRequest) -> int:
        ref = request.ref
        if await self._decisions.get_decision(ref):
            return len(request.positions)
        await self._jobs.get(ref.job)
        raise await not_in_flight_error(self._decisions, ref, request.rank)


def check_upload(upload: UploadRequest, rows: int, reference: ReferenceInfo) -> None:
    """Refuse what the reference model cannot embed; `rows` is how many the rank submitted.

    Raises:
        InvalidField: If positions, names, datatypes or shapes are not what it needs.
    """
    positions = np.asarray(upload.positions, np.int64)
    if not positions.size or positions[-1] >= rows or (np.diff(positions) <= 0).any():
        raise InvalidField(
            f"positions {_shorten(upload.positions)} are not right: "
            f"expected one or more, ascending, without repeats, below {rows}",
            upload.metadata,
            field_name="positions",
        )
    inputs = {i.name: i for i in reference.inputs}
    names = [spec.name for spec in upload.specs]
    if sorted(names) != sorted(inputs):
        raise InvalidField(
            f"tensors are {sorted(names)}, expected {sorted(inputs)}: the inputs of {reference.name!r}",
            upload.metadata,
            field_name="tensors",
        )
    for spec in upload.specs:
        expected = inputs[spec.name]
        if spec.datatype != expected.datatype:
            raise InvalidField(
                f"tensors[{spec.name}].datatype is {spec.datatype}, expected {expected.datatype}",
                upload.metadata,
                field_name=f"tensors[{spec.name}].datatype",
            )
        wanted = (len(upload.positions), *expected.shape)
        if len(spec.shape) != len(wanted) or any(w not in (-1, s) for w, s in zip(wanted, spec.shape, strict=True)):
            raise InvalidField(
                f"tensors[{spec.name}].shape is {list(spec.shape)}, expected {list(wanted)}",
                upload.metadata,
                field_name=f"tensors[{spec.name}].shape",
            )


def shards_of_upload(
    upload: UploadRequest,
    buffers: Sequence[Bytes],
    keys: Sequence[str],
    reference: ReferenceInfo,
    digest: str,
    *,
    shard_examples: int,
) -> list[Shard]:
    """Return shards of the upload of this digest; `keys` are those of all the rank's rows."""
    arrays = {spec.name: (spec, as_numpy(spec, data)) for spec, data in zip(upload.specs, buffers, strict=True)}
    return [
        Shard(
            shard_id=f"{upload.rank}-{digest[:16]}-{start // shard_examples:06d}",
            job=upload.ref.job,
            super_batch_id=upload.ref.super_batch_id,
            reference_model=reference.name,
            reference_version=reference.version,
            keys=tuple(keys[p] for p in upload.positions[start : start + shard_examples]),
            features=_pack({n: (s.datatype, a[start : start + shard_examples]) for n, (s, a) in arrays.items()}),
            traceparent=tracing.traceparent(),
        )
        for start in range(0, len(upload.positions), shard_examples)
    ]


def _pack(arrays: dict[str, tuple[str, Any]]) -> bytes:
    description = {
        "tensors": [{"name": n, "datatype": datatype, "shape": a.shape} for n, (datatype, a) in arrays.items()]
    }
    return blobs.pack(
        description, *(np.ascontiguousarray(a).view(np.uint8).reshape(-1).data for _, a in arrays.values())
    )


def _shorten(positions: Sequence[int]) -> str:
    return str(list(positions)) if len(positions) <= 8 else f"[{', '.join(map(str, positions[:8]))}, …]"
