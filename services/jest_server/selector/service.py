"""The gRPC services: decode, call the use case, encode."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jest_proto.v1 import jobs_pb2, jobs_pb2_grpc, selection_pb2, selection_pb2_grpc
from jest_server.runtime.logs import bound
from jest_server.selector import wire
from jest_wire import tracing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import grpc

    from jest_server.domain.super_batches import RankRef
    from jest_server.runtime.security.rate import CallRates
    from jest_server.runtime.settings import SelectorSettings
    from jest_server.selector.decide.select_sub_batch import SelectSubBatch
    from jest_server.selector.intake.open_attempt import OpenAttempt
    from jest_server.selector.intake.submit import SubmitSuperBatch
    from jest_server.selector.intake.uploads import UploadExamples
    from jest_server.use_cases.jobs import JobRegistry

    Context = grpc.aio.ServicerContext[Any, Any]

NO_DEADLINE_S = 600.0
"""The deadline of a call without one, so that no call waits forever."""


class JobServicer(jobs_pb2_grpc.JobServiceServicer):
    """jest.v1.JobService."""

    def __init__(self, jobs: JobRegistry, attempt: OpenAttempt) -> None:
        self._jobs = jobs
        self._attempt = attempt

    async def CreateJob(self, request: jobs_pb2.CreateJobRequest, context: Context) -> jobs_pb2.CreateJobResponse:
        job, reference, created = await self._jobs.create(wire.job_spec_from_wire(request.spec))
        _, counters = await self._jobs.state(job)
        return jobs_pb2.CreateJobResponse(job=wire.job_to_wire(job, reference, counters), created=created)

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Context) -> jobs_pb2.GetJobResponse:
        job = await self._jobs.get(wire.job_name_from_wire(request.name, "name"))
        return jobs_pb2.GetJobResponse(job=wire.job_to_wire(job, *await self._jobs.state(job)))

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, context: Context) -> jobs_pb2.ListJobsResponse:
        jobs, next_after = await self._jobs.list(after=request.page_token, limit=wire.page_size_from_wire(request))
        page = [wire.job_to_wire(job, *await self._jobs.state(job)) for job in jobs]
        return jobs_pb2.ListJobsResponse(jobs=page, next_page_token=next_after or "")

    async def DeleteJob(self, request: jobs_pb2.DeleteJobRequest, context: Context) -> jobs_pb2.DeleteJobResponse:
        name = wire.job_name_from_wire(request.name, "name")
        return jobs_pb2.DeleteJobResponse(deleted=await self._jobs.delete(name))

    async def OpenAttempt(self, request: jobs_pb2.OpenAttemptRequest, context: Context) -> jobs_pb2.OpenAttemptResponse:
        return jobs_pb2.OpenAttemptResponse(attempt=await self._attempt.run(wire.attempt_request_from_wire(request)))


class SelectionServicer(selection_pb2_grpc.SelectionServiceServicer):
    """jest.v1.SelectionService."""

    def __init__(
        self,
        submit: SubmitSuperBatch,
        upload: UploadExamples,
        select: SelectSubBatch,
        settings: SelectorSettings,
        rates: CallRates,
    ) -> None:
        self._submit = submit
        self._upload = upload
        self._select = select
        self._settings = settings
        self._rates = rates

    async def SubmitSuperBatch(
        self, request: selection_pb2.SubmitSuperBatchRequest, context: Context
    ) -> selection_pb2.SubmitSuperBatchResponse:
        with self._admitted(request) as caller:
            accepted = await self._submit.run(wire.submission_from_wire(caller, request))
            return wire.accepted_to_wire(accepted)

    async def UploadExamples(
        self, request_iterator: AsyncIterator[selection_pb2.UploadExamplesRequest], context: Context
    ) -> selection_pb2.UploadExamplesResponse:
        header = await wire.header_of(request_iterator)
        with self._admitted(header) as caller:
            accepted = await self._upload.run(wire.upload_from_wire(caller, header), request_iterator)
            return selection_pb2.UploadExamplesResponse(accepted=accepted)

    async def SelectSubBatch(
        self, request_iterator: AsyncIterator[selection_pb2.SelectSubBatchRequest], context: Context
    ) -> selection_pb2.SelectSubBatchResponse:
        header = await wire.header_of(request_iterator)
        with self._admitted(header) as caller:
            request = wire.select_request_from_wire(caller, header, deadline_s=_deadline_s(context))
            outcome = await self._select.run(request, request_iterator)
            return await asyncio.to_thread(wire.outcome_to_wire, outcome, request)

    async def GetServerInfo(
        self, request: selection_pb2.GetServerInfoRequest, context: Context
    ) -> selection_pb2.GetServerInfoResponse:
        return wire.server_info(self._settings)

    @contextmanager
    def _admitted(self, message: Any) -> Iterator[RankRef]:
        """Admit a call within its job's rate, and name what it is about in its span and its logs."""
        caller = wire.rank_ref_from_wire(message)
        ref, rank = caller.ref, caller.rank
        self._rates.admit_to_job(ref.job, now_s=time.monotonic())
        tracing.about(ref.job, ref.super_batch_id, rank)
        with bound(job=ref.job, super_batch=ref.super_batch_id, rank=rank):
            yield caller


def _deadline_s(context: Context) -> float:
    """Return the caller's deadline, on the clock of `time.monotonic`."""
    remaining_s = context.time_remaining()
    return time.monotonic() + (NO_DEADLINE_S if remaining_s is None else remaining_s)
