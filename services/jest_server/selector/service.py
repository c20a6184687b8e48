"""The gRPC services: decode, call the use case, encode."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, get_args

import torch
from pydantic import TypeAdapter, ValidationError

from jest_core.policy import Loss, Precision, Scoring
from jest_proto.v1 import jobs_pb2, jobs_pb2_grpc, selection_pb2, selection_pb2_grpc, tensors_pb2
from jest_server import __version__
from jest_server.domain import tenants
from jest_server.domain.errors import InvalidField
from jest_server.domain.jobs import JobName
from jest_server.domain.super_batches import SuperBatchId
from jest_server.runtime.logs import bound
from jest_server.selector import wire
from jest_server.selector.decide.select import Call
from jest_server.selector.intake.request import Rows
from jest_server.selector.intake.uploads import Upload
from jest_server.selector.learner_outputs.header import LEARNER_DATATYPES, check_header, digest_of
from jest_server.selector.learner_outputs.receive import LearnerReceiver, announced_bytes, receive_tensors
from jest_wire import tracing
from jest_wire.learner_outputs import EMBEDDINGS
from jest_wire.tensors import encode
from jest_wire.values import duration, enum_value

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from jest_server.runtime.security.rate import CallRates
    from jest_server.runtime.settings import SelectorSettings
    from jest_server.selector.decide.select import Selections
    from jest_server.selector.intake.submit import Submissions
    from jest_server.selector.learner_outputs.pending import Assemblies, Outcome
    from jest_server.use_cases.jobs import Jobs

    Context = grpc.aio.ServicerContext[Any, Any]

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
        name = tenants.scoped(_checked(_JOB_NAME, request.spec.name, "spec.name"))
        spec = wire.job_spec_from_wire(request.spec).model_copy(update={"name": name})
        job, reference, created = await self._jobs.create(spec)
        _, counters = await self._jobs.state(job)
        return jobs_pb2.CreateJobResponse(job=wire.job_to_wire(job, reference, counters), created=created)

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Context) -> jobs_pb2.GetJobResponse:
        job = await self._jobs.get(tenants.scoped(_checked(_JOB_NAME, request.name, "name")))
        return jobs_pb2.GetJobResponse(job=wire.job_to_wire(job, *await self._jobs.state(job)))

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, context: Context) -> jobs_pb2.ListJobsResponse:
        size = request.page_size if request.HasField("page_size") else _DEFAULT_PAGE
        if not 1 <= size <= _LARGEST_PAGE:
            raise InvalidField(f"page_size is {size}, expected 1 to {_LARGEST_PAGE}", field_name="page_size")
        found = await self._jobs.list(after=tenants.scoped(request.page_token), limit=size + 1)
        jobs = [job for job in found if job.spec.name.startswith(tenants.prefix())]
        token = tenants.unscoped(jobs[size - 1].spec.name) if len(jobs) > size else ""
        page = [wire.job_to_wire(job, *await self._jobs.state(job)) for job in jobs[:size]]
        return jobs_pb2.ListJobsResponse(jobs=page, next_page_token=token)

    async def DeleteJob(self, request: jobs_pb2.DeleteJobRequest, context: Context) -> jobs_pb2.DeleteJobResponse:
        name = tenants.scoped(_checked(_JOB_NAME, request.name, "name"))
        return jobs_pb2.DeleteJobResponse(deleted=await self._jobs.delete(name))


class SelectionServicer(selection_pb2_grpc.SelectionServiceServicer):
    """jest.v1.SelectionService."""

    def __init__(
        self,
        submissions: Submissions,
        selections: Selections,
        assemblies: Assemblies,
        settings: SelectorSettings,
        rates: CallRates,
    ) -> None:
        self._submissions = submissions
        self._selections = selections
        self._assemblies = assemblies
        self._receiver = LearnerReceiver(selections, assemblies, settings)
        self._settings = settings
        self._rates = rates

    async def SubmitSuperBatch(
        self,
        request: selection_pb2.SubmitSuperBatchRequest,
        context: Context,
    ) -> selection_pb2.SubmitSuperBatchResponse:
        job, super_batch_id = self._admitted(request)
        tracing.about(job, super_batch_id, request.rank)
        with bound(job=job, super_batch=super_batch_id, rank=request.rank):
            rows = Rows(
                job,
                super_batch_id,
                request.rank,
                request.world_size,
                keys=tuple(request.example_keys),
                step=request.step if request.HasField("step") else None,
                group_labels=tuple(request.group_labels),
                sources=tuple(request.example_sources),
            )
            accepted = await self._submissions.submit(rows)
        return selection_pb2.SubmitSuperBatchResponse(
            missing_positions=accepted.missing,
            reference=None if accepted.reference is None else wire.reference_to_wire(accepted.reference),
            decided=accepted.decided,
        )

    async def UploadExamples(
        self,
        request_iterator: AsyncIterator[selection_pb2.UploadExamplesRequest],
        context: Context,
    ) -> selection_pb2.UploadExamplesResponse:
        header = await _header(request_iterator)
        job, super_batch_id = self._admitted(header)
        tracing.about(job, super_batch_id, header.rank)
        with bound(job=job, super_batch=super_batch_id, rank=header.rank):
            limit, context_ids = self._settings.max_tensor_bytes, {"job": job, "super_batch_id": super_batch_id}
            nbytes = announced_bytes(header.tensors, max_bytes=limit)
            await self._submissions.require_room(job, nbytes, context_ids)
            with self._assemblies.receiving(nbytes, context_ids):
                buffers = await receive_tensors(header.tensors, request_iterator, max_bytes=limit)
                positions, specs = tuple(header.positions), tuple(header.tensors)
                upload = Upload(job, super_batch_id, header.rank, positions, specs, buffers)
                return selection_pb2.UploadExamplesResponse(accepted=await self._submissions.upload(upload))

    async def SelectSubBatch(
        self, request_iterator: AsyncIterator[selection_pb2.SelectSubBatchRequest], context: Context
    ) -> selection_pb2.SelectSubBatchResponse:
        header = await _header(request_iterator)
        job, super_batch_id = self._admitted(header)
        tracing.about(job, super_batch_id, header.rank)
        call = Call(job, super_batch_id, header.rank, header.world_size)
        with bound(job=job, super_batch=super_batch_id, rank=header.rank):
            check_header(header, await self._selections.policy_of(call))
            digest = digest_of(header)
            outcome = await self._selections.recorded(call, digest)
            if outcome is None:
                outputs = await self._receiver.receive(
                    header, call, digest, request_iterator, deadline_s=_time_left(context)
                )
                outcome = await self._selections.select(call, outputs, deadline_s=_time_left(context))
                if header.HasField("last_step"):
                    self._selections.stepped(call, wire.step_times_from_wire(header.last_step))
            embeddings = await asyncio.to_thread(_reference_of, outcome, header)
            return _answer(outcome, header, embeddings)

    async def GetServerInfo(
        self,
        request: selection_pb2.GetServerInfoRequest,
        context: Context,
    ) -> selection_pb2.GetServerInfoResponse:
        return selection_pb2.GetServerInfoResponse(
            version=__version__,
            scorings=[enum_value(jobs_pb2.Scoring, name) for name in get_args(Scoring)],
            losses=[enum_value(jobs_pb2.Loss, name) for name in get_args(Loss)],
            precisions=[enum_value(jobs_pb2.Precision, name) for name in get_args(Precision)],
            learner_datatypes=LEARNER_DATATYPES,
            max_rows_per_rank=self._settings.max_rows_per_rank,
            max_tensor_bytes=self._settings.max_tensor_bytes,
            max_message_bytes=self._settings.max_message_bytes,
            max_world_size=self._settings.max_world_size,
            max_pair_loss_bytes=self._settings.max_pair_loss_bytes,
        )

    def _admitted(self, message: Any) -> tuple[str, str]:
        """Returns the job and the super-batch of a call that the job may still make."""
        job = tenants.scoped(_checked(_JOB_NAME, message.job, "job"))
        super_batch_id = _checked(_SUPER_BATCH_ID, message.super_batch_id, "super_batch_id")
        self._rates.admit_to_job(job, now_s=time.monotonic())
        return job, super_batch_id


def _time_left(context: Context) -> float:
    """Returns the seconds until the caller's deadline."""
    remaining = context.time_remaining()
    return NO_DEADLINE_S if remaining is None else remaining


def _answer(
    outcome: Outcome,
    header: selection_pb2.SelectSubBatchHeader,
    reference_embeddings: list[tensors_pb2.Tensor],
) -> selection_pb2.SelectSubBatchResponse:
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
        timings=selection_pb2.StageTimings(**{k: duration(s) for k, s in decision.timings_s.items()}),
        fallback=wire.fallback_to_wire(decision.fallback),
        fallback_reason=decision.fallback_reason,
        reference_embeddings=reference_embeddings,
        weights=None if decision.weights is None else decision.weights[header.rank],
        gain=decision.policy.gain if decision.gain is None else decision.gain,
    )


def _reference_of(outcome: Outcome, header: selection_pb2.SelectSubBatchHeader) -> list[tensors_pb2.Tensor]:
    if outcome.reference is None or not header.return_reference_embeddings:
        return []
    rows = torch.tensor(outcome.decision.positions[header.rank]) + outcome.row_offset(header.rank)
    image, text = outcome.reference[:, rows].unbind(0)
    specs, buffers = encode(dict(zip(EMBEDDINGS, (image, text), strict=True)))
    return [tensors_pb2.Tensor(spec=s, data=b.tobytes()) for s, b in zip(specs, buffers, strict=True)]


async def _header(messages: AsyncIterator[Any]) -> Any:
    async for message in messages:
        if message.WhichOneof("message") == "header":
            return message.header
        break
    raise InvalidField("the stream does not start with a header", field_name="header")


def _checked(adapter: TypeAdapter[str], value: str, field: str) -> str:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise wire.invalid_field(error, prefix=field) from error
