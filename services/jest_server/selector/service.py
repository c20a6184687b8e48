"""The gRPC services: decode, call the use case, encode."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError

from jest_core import Embeddings
from jest_proto.tensors import (
    Assembler,
    TensorChecksumError,
    TensorError,
    TensorTooLargeError,
    as_torch,
    content_digest,
    encode,
)
from jest_proto.v1 import jobs_pb2, jobs_pb2_grpc, selection_pb2, selection_pb2_grpc, tensors_pb2
from jest_server import __version__
from jest_server.errors import ChecksumMismatch, InvalidField, TooLarge
from jest_server.logs import bound
from jest_server.model import JobName, PolicySpec, SuperBatchId
from jest_server.selector import wire
from jest_server.selector.assembly import LearnerOutputs
from jest_server.selector.selections import Call
from jest_server.selector.submissions import Upload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import grpc

    from jest_proto.tensors import Bytes
    from jest_server.selector.assembly import Assemblies, Outcome
    from jest_server.selector.jobs import Jobs
    from jest_server.selector.selections import Selections
    from jest_server.selector.submissions import Submissions
    from jest_server.settings import SelectorSettings

    Context = grpc.aio.ServicerContext[Any, Any]

LEARNER_DATATYPES = ("FP32", "FP16", "BF16")
LEARNER_TENSORS = ("image_embedding", "text_embedding")
NO_DEADLINE_S = 600.0
"""What a call without a deadline gets: nothing waits for ever."""
_DEFAULT_PAGE = 100
_LARGEST_PAGE = 1000
_JOB_NAME: TypeAdapter[str] = TypeAdapter(JobName)
_SUPER_BATCH_ID: TypeAdapter[str] = TypeAdapter(SuperBatchId)


class JobServicer(jobs_pb2_grpc.JobServiceServicer):
    """jest.v1.JobService."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    async def CreateJob(self, request: jobs_pb2.CreateJobRequest, context: Context) -> jobs_pb2.CreateJobResponse:
        job, reference, created = await self._jobs.create(wire.job_spec_from_wire(request.spec))
        _, counters = await self._jobs.state(job)
        return jobs_pb2.CreateJobResponse(job=wire.job_to_wire(job, reference, counters), created=created)

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Context) -> jobs_pb2.GetJobResponse:
        job = await self._jobs.get(_checked(_JOB_NAME, request.name, "name"))
        return jobs_pb2.GetJobResponse(job=wire.job_to_wire(job, *await self._jobs.state(job)))

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, context: Context) -> jobs_pb2.ListJobsResponse:
        size = request.page_size if request.HasField("page_size") else _DEFAULT_PAGE
        if not 1 <= size <= _LARGEST_PAGE:
            raise InvalidField(f"page_size is {size}, expected 1 to {_LARGEST_PAGE}", field_name="page_size")
        jobs = await self._jobs.list(after=request.page_token, limit=size + 1)
        token = jobs[size - 1].spec.name if len(jobs) > size else ""
        page = [wire.job_to_wire(job, *await self._jobs.state(job)) for job in jobs[:size]]
        return jobs_pb2.ListJobsResponse(jobs=page, next_page_token=token)

    async def DeleteJob(self, request: jobs_pb2.DeleteJobRequest, context: Context) -> jobs_pb2.DeleteJobResponse:
        name = _checked(_JOB_NAME, request.name, "name")
        return jobs_pb2.DeleteJobResponse(deleted=await self._jobs.delete(name))


class SelectionServicer(selection_pb2_grpc.SelectionServiceServicer):
    """jest.v1.SelectionService."""

    def __init__(
        self, submissions: Submissions, selections: Selections, assemblies: Assemblies, settings: SelectorSettings
    ) -> None:
        self._submissions = submissions
        self._selections = selections
        self._assemblies = assemblies
        self._settings = settings

    async def SubmitSuperBatch(
        self,
        request: selection_pb2.SubmitSuperBatchRequest,
        context: Context,
    ) -> selection_pb2.SubmitSuperBatchResponse:
        job, super_batch_id = _ids(request)
        with bound(job=job, super_batch=super_batch_id, rank=request.rank):
            accepted = await self._submissions.submit(
                job, super_batch_id, request.rank, request.world_size, tuple(request.example_keys)
            )
        return selection_pb2.SubmitSuperBatchResponse(
            missing_positions=accepted.missing,
            reference=wire.reference_to_wire(accepted.reference),
            decided=accepted.decided,
        )

    async def UploadExamples(
        self,
        request_iterator: AsyncIterator[selection_pb2.UploadExamplesRequest],
        context: Context,
    ) -> selection_pb2.UploadExamplesResponse:
        header = await _header(request_iterator)
        job, super_batch_id = _ids(header)
        with bound(job=job, super_batch=super_batch_id, rank=header.rank):
            buffers = await self._receive(header.tensors, request_iterator)
            upload = Upload(job, super_batch_id, header.rank, tuple(header.positions), tuple(header.tensors), buffers)
            return selection_pb2.UploadExamplesResponse(accepted=await self._submissions.upload(upload))

    async def SelectSubBatch(
        self, request_iterator: AsyncIterator[selection_pb2.SelectSubBatchRequest], context: Context
    ) -> selection_pb2.SelectSubBatchResponse:
        header = await _header(request_iterator)
        job, super_batch_id = _ids(header)
        call = Call(job, super_batch_id, header.rank, header.world_size)
        with bound(job=job, super_batch=super_batch_id, rank=header.rank):
            _check_learner_header(header)
            digest = content_digest(header.tensors, header.embeddings.scale, header.embeddings.bias)
            outcome = await self._selections.recorded(call, digest)
            if outcome is None:
                outputs = await self._learner_outputs(header, call, digest, request_iterator)
                remaining = context.time_remaining()
                outcome = await self._selections.select(
                    call, outputs, deadline_s=NO_DEADLINE_S if remaining is None else remaining
                )
            return _answer(outcome, header)

    async def GetServerInfo(
        self,
        request: selection_pb2.GetServerInfoRequest,
        context: Context,
    ) -> selection_pb2.GetServerInfoResponse:
        fields = PolicySpec.model_fields
        scorings = fields["scoring"].annotation.__args__  # type: ignore[union-attr]
        losses = fields["loss"].annotation.__args__  # type: ignore[union-attr]
        return selection_pb2.GetServerInfoResponse(
            version=__version__,
            scorings=[jobs_pb2.Scoring.Value(f"SCORING_{name.upper()}") for name in scorings],
            losses=[jobs_pb2.Loss.Value(f"LOSS_{name.upper()}") for name in losses],
            learner_datatypes=LEARNER_DATATYPES,
            max_rows_per_rank=self._settings.max_rows_per_rank,
            max_tensor_bytes=self._settings.max_tensor_bytes,
            max_message_bytes=self._settings.max_message_bytes,
            max_world_size=self._settings.max_world_size,
        )

    async def _learner_outputs(
        self,
        header: selection_pb2.SelectSubBatchHeader,
        call: Call,
        digest: str,
        chunks: AsyncIterator[selection_pb2.SelectSubBatchRequest],
    ) -> LearnerOutputs:
        rows = await self._selections.rows_of(call)
        if header.tensors[0].shape[0] != rows:
            field = f"tensors[{header.tensors[0].name}].shape"
            raise InvalidField(
                f"{field} is {list(header.tensors[0].shape)}, expected [{rows}, D]: so many rows were submitted",
                call.context(),
                field_name=field,
            )
        self._assemblies.reserve(sum(spec.byte_length for spec in header.tensors), call.context())
        buffers = await self._receive(header.tensors, chunks)
        tensors = {s.name: as_torch(s, b) for s, b in zip(header.tensors, buffers, strict=True)}
        try:
            embeddings = Embeddings(
                image=tensors["image_embedding"],
                text=tensors["text_embedding"],
                scale=header.embeddings.scale,
                bias=header.embeddings.bias,
            )
        except ValueError as error:
            raise InvalidField(f"embeddings: {error}", call.context(), field_name="embeddings") from error
        return LearnerOutputs(embeddings, digest)

    async def _receive(self, specs: Sequence[tensors_pb2.TensorSpec], messages: AsyncIterator[Any]) -> list[Bytes]:
        """Receives the announced tensors, refusing wrong sizes before anything is allocated for them."""
        try:
            assembler = Assembler(specs, max_bytes=self._settings.max_tensor_bytes)
            async for message in messages:
                assembler.add(_chunk(message))
            return assembler.finish()
        except TensorChecksumError as error:
            raise ChecksumMismatch(str(error), retry_after_s=0.0) from error
        except TensorTooLargeError as error:
            raise TooLarge(str(error), field_name=error.field) from error
        except TensorError as error:
            raise InvalidField(str(error), field_name=error.field) from error


def _answer(outcome: Outcome, header: selection_pb2.SelectSubBatchHeader) -> selection_pb2.SelectSubBatchResponse:
    decision = outcome.decision
    positions = decision.positions[header.rank]
    return selection_pb2.SelectSubBatchResponse(
        positions=positions,
        sub_batch_size=decision.sub_batch_size,
        super_batch_size=decision.super_batch_size,
        reference_version="" if decision.reference is None else decision.reference.version,
        cache_hits=decision.cache_hits,
        reference_inferences=decision.reference_inferences,
        perplexity=decision.perplexity,
        timings=selection_pb2.StageTimings(**{k: wire.duration(s) for k, s in decision.timings_s.items()}),
        fallback=wire.fallback_to_wire(decision.fallback),
        fallback_reason=decision.fallback_reason,
        reference_embeddings=_reference_of(outcome, header) if header.return_reference_embeddings else [],
    )


def _reference_of(outcome: Outcome, header: selection_pb2.SelectSubBatchHeader) -> list[tensors_pb2.Tensor]:
    if outcome.reference is None:
        return []
    rows = torch.tensor(outcome.decision.positions[header.rank]) + outcome.row_offset(header.rank)
    image, text = outcome.reference[rows].unbind(1)
    specs, buffers = encode(dict(zip(LEARNER_TENSORS, (image, text), strict=True)))
    return [tensors_pb2.Tensor(spec=s, data=b.tobytes()) for s, b in zip(specs, buffers, strict=True)]


def _check_learner_header(header: selection_pb2.SelectSubBatchHeader) -> None:
    if header.WhichOneof("outputs") != "embeddings":
        raise InvalidField("outputs is not set, expected embeddings", field_name="outputs")
    for name in ("scale", "bias"):
        value = getattr(header.embeddings, name)
        if not math.isfinite(value) or (name == "scale" and value <= 0):
            expected = "a finite number larger than 0" if name == "scale" else "a finite number"
            raise InvalidField(f"embeddings.{name} is {value}, expected {expected}", field_name=f"embeddings.{name}")
    specs = {spec.name: spec for spec in header.tensors}
    if len(header.tensors) != len(LEARNER_TENSORS) or set(specs) != set(LEARNER_TENSORS):
        raise InvalidField(
            f"tensors are {[spec.name for spec in header.tensors]}, expected {list(LEARNER_TENSORS)}",
            field_name="tensors",
        )
    for spec in header.tensors:
        if spec.datatype not in LEARNER_DATATYPES:
            raise InvalidField(
                f"tensors[{spec.name}].datatype is {spec.datatype!r}, expected one of {', '.join(LEARNER_DATATYPES)}",
                field_name=f"tensors[{spec.name}].datatype",
            )
        if len(spec.shape) != 2 or min(spec.shape) < 1:
            raise InvalidField(
                f"tensors[{spec.name}].shape is {list(spec.shape)}, expected [rows, D]",
                field_name=f"tensors[{spec.name}].shape",
            )
    image, text = (specs[name] for name in LEARNER_TENSORS)
    if (list(image.shape), image.datatype) != (list(text.shape), text.datatype):
        raise InvalidField(
            f"tensors[text_embedding] is {text.datatype} {list(text.shape)}, "
            f"expected the same as image_embedding: {image.datatype} {list(image.shape)}",
            field_name="tensors[text_embedding]",
        )


async def _header(messages: AsyncIterator[Any]) -> Any:
    async for message in messages:
        if message.WhichOneof("message") == "header":
            return message.header
        break
    raise InvalidField("the stream does not start with a header", field_name="header")


def _chunk(message: Any) -> tensors_pb2.TensorChunk:
    if message.WhichOneof("message") != "chunk":
        raise TensorError("message", "is a second header, expected a chunk")
    chunk: tensors_pb2.TensorChunk = message.chunk
    return chunk


def _ids(message: Any) -> tuple[str, str]:
    job = _checked(_JOB_NAME, message.job, "job")
    return job, _checked(_SUPER_BATCH_ID, message.super_batch_id, "super_batch_id")


def _checked(adapter: TypeAdapter[str], value: str, field: str) -> str:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise wire.invalid_field(error, prefix=field) from error
