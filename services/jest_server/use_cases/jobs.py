"""The use case of managing jobs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from jest_server.domain.errors import InvalidField, JobConflict, JobUnknown, QueueFull, ReferenceUnavailable
from jest_server.domain.policies import policy_of
from jest_server.domain.tenants import prefix, prefix_of, scoped, unscoped

if TYPE_CHECKING:
    from jest_server.domain.jobs import Counters, Job, JobSpec
    from jest_server.domain.ports import JobStore
    from jest_server.domain.references import ReferenceInfo

REFERENCE_RETRY_S = 2.0
JOBS_RETRY_S = 10.0


class JobRegistry:
    """Create, find and delete jobs."""

    def __init__(self, store: JobStore, *, max_world_size: int, max_jobs_per_tenant: int = 1000) -> None:
        self._store = store
        self._max_jobs_per_tenant = max_jobs_per_tenant
        self._max_world_size = max_world_size

    async def create(self, spec: JobSpec) -> tuple[Job, ReferenceInfo | None, bool]:
        """Register a job, or finds the one that was registered with the same spec.

        Raises:
            InvalidField: If the policy makes no sense or lacks the reference model that it needs, or the world is
                larger than this server allows.
            JobConflict: If the name is taken by another spec.
            ReferenceUnavailable: If no scorer serves the reference model.
            QueueFull: If the tenant has as many jobs as it may.
        """
        try:
            policy = policy_of(spec.policy)
        except ValueError as error:
            raise InvalidField(f"spec.policy: {error}", field_name="spec.policy") from error
        if spec.world_size > self._max_world_size:
            raise InvalidField(
                f"spec.world_size is {spec.world_size}, the limit is {self._max_world_size}",
                field_name="spec.world_size",
            )
        if policy.needs_reference_model and not spec.reference_model:
            raise InvalidField(
                f"spec.reference_model is empty, expected a name: scoring {spec.policy.scoring!r} under loss "
                f"{spec.policy.loss!r} needs the reference model",
                field_name="spec.reference_model",
            )
        reference = await self.reference(spec)
        await self._require_room(spec.name)
        job, created = await self._store.create_job(spec, now_s=time.time())
        if job.spec != spec:
            field = next(f for f in type(spec).model_fields if getattr(spec, f) != getattr(job.spec, f))
            raise JobConflict(
                f"job {spec.name!r} exists with {field} = {getattr(job.spec, field)!r}, "
                f"this call has {getattr(spec, field)!r}; choose another name or delete the job",
                {"job": spec.name, "field": field},
            )
        return job, reference, created

    async def _require_room(self, name: str) -> None:
        """Refuse a new job of a tenant that has enough; several at the same moment may all be let in."""
        of_tenant = prefix_of(name)
        if await self._store.get_job(name) is not None:
            return
        held = await self._store.list_jobs(after=of_tenant, limit=self._max_jobs_per_tenant)
        if sum(job.spec.name.startswith(of_tenant) for job in held) >= self._max_jobs_per_tenant:
            raise QueueFull(
                f"there are {self._max_jobs_per_tenant} jobs, the limit (JEST_MAX_JOBS_PER_TENANT): delete some",
                {"job": name, "limit": "JEST_MAX_JOBS_PER_TENANT"},
                retry_after_s=JOBS_RETRY_S,
            )

    async def get(self, name: str) -> Job:
        """Find a job.

        Raises:
            JobUnknown: If there is no job of this name.
        """
        job = await self._store.get_job(name)
        if job is None:
            raise JobUnknown(f"job {name!r} does not exist; create it first", {"job": name})
        return job

    async def state(self, job: Job) -> tuple[ReferenceInfo | None, Counters]:
        """Return what is known of a job now: its reference model, if it is served, and its accounts."""
        name = job.spec.reference_model
        reference = await self._store.get_reference(name) if name else None
        return reference, await self._store.counters(job.spec.name)

    async def reference(self, spec: JobSpec) -> ReferenceInfo | None:
        """Find the job's reference model, served now; None if the job names none.

        Raises:
            ReferenceUnavailable: If no scorer announces it.
        """
        name = spec.reference_model
        if not name:
            return None
        reference = await self._store.get_reference(name)
        if reference is None:
            raise ReferenceUnavailable(
                f"no scorer serves reference model {name!r} at the moment",
                {"reference_model": name},
                retry_after_s=REFERENCE_RETRY_S,
            )
        return reference

    async def list(self, *, after: str, limit: int) -> tuple[list[Job], str | None]:
        """Return up to `limit` of the caller's jobs whose names sort after `after`, in order of name.

        With them goes the name after which the next page starts; None after the last page.
        """
        found = await self._store.list_jobs(after=scoped(after), limit=limit + 1)
        own = [job for job in found if job.spec.name.startswith(prefix())]
        return own[:limit], unscoped(own[limit - 1].spec.name) if len(own) > limit else None

    async def delete(self, name: str) -> bool:
        """Delete a job and all that belongs to it; False if there was none."""
        return await self._store.delete_job(name)
