"""Jobs, their counters, and the reference models that scorers announce, in this process's memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from typing_extensions import override

from jest_server.domain.errors import JobUnknown
from jest_server.domain.jobs import Counters, Job
from jest_server.domain.ports import JobStore
from jest_server.domain.references import Announced
from support.memory_stores.state import AnnouncedVersion, JobState

if TYPE_CHECKING:
    from jest_server.domain.attempts import AttemptRequest, OpenResult
    from jest_server.domain.jobs import JobSpec
    from jest_server.domain.references import ReferenceInfo
    from support.memory_stores.state import MemoryState


class MemoryJobStore(JobStore):
    """Jobs and announced versions in dictionaries."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state

    @override
    async def create_job(self, spec: JobSpec, *, now_s: float) -> tuple[Job, bool]:
        known = self._state.jobs.get(spec.name)
        if known is not None:
            return known.job, False
        job = Job(spec=spec, created_at_s=now_s)
        self._state.jobs[spec.name] = JobState(job)
        return job, True

    @override
    async def get_job(self, name: str) -> Job | None:
        known = self._state.jobs.get(name)
        return None if known is None else known.job

    @override
    async def list_jobs(self, *, after: str, limit: int) -> list[Job]:
        jobs = self._state.jobs
        return [jobs[name].job for name in sorted(jobs) if name > after][:limit]

    @override
    async def delete_job(self, name: str) -> bool:
        job = self._state.jobs.pop(name, None)
        if job is None:
            return False
        for super_batch_id in list(job.in_flight):
            self._state.leave_flight(job, super_batch_id)
        for queue in self._state.model_queues.values():
            queue.forget(name)
        return True

    @override
    async def counters(self, name: str) -> Counters:
        job = self._state.jobs.get(name)
        return Counters() if job is None else Counters.model_validate(job.counters)

    @override
    async def open_attempt(self, request: AttemptRequest) -> OpenResult:
        job = self._state.jobs.get(request.job)
        if job is None:
            raise JobUnknown(f"job {request.job!r} does not exist any more", {"job": request.job})
        return job.attempts.open(request)

    @override
    async def announce_reference(self, info: ReferenceInfo, *, ttl_s: float) -> None:
        now = time.monotonic()
        version = (info.name, info.version)
        known = self._state.references.setdefault(version, AnnouncedVersion(info, since=now))
        known.info, known.until = info, now + ttl_s

    @override
    async def record_fingerprint(self, info: ReferenceInfo, fingerprint: bytes) -> bytes:
        return self._state.fingerprints.setdefault((info.name, info.version), fingerprint)

    @override
    async def get_reference(self, name: str) -> ReferenceInfo | None:
        served = [known for known in self._state.references.values() if known.info.name == name and known.served]
        return max(served, key=lambda known: known.since).info if served else None

    @override
    async def list_references(self) -> list[Announced]:
        known = sorted(self._state.references.values(), key=lambda known: (known.info.name, -known.since))
        offset_s = time.time() - time.monotonic()
        return [Announced(reference=known.info, since_s=known.since + offset_s, served=known.served) for known in known]
