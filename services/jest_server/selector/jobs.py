"""The use case of managing jobs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from jest_core import SelectionPolicy
from jest_server.errors import InvalidField, JobConflict, JobUnknown, ReferenceUnavailable

if TYPE_CHECKING:
    from jest_server.model import Counters, Job, JobSpec, PolicySpec, ReferenceInfo
    from jest_server.ports import SuperBatchStore

REFERENCE_RETRY_S = 2.0


def policy_of(spec: PolicySpec) -> SelectionPolicy:
    """Gives a recorded policy its meaning.

    Raises:
        ValueError: If the combination makes no sense; the message names field, value and expectation.
    """
    fields = spec.model_dump(exclude={"filter_ratio"})
    ratio = None if spec.filter_ratio is None else float(spec.filter_ratio)
    return SelectionPolicy(**fields, filter_ratio=ratio)


class Jobs:
    """Creates, finds and deletes jobs."""

    def __init__(self, store: SuperBatchStore, *, max_world_size: int) -> None:
        self._store = store
        self._max_world_size = max_world_size

    async def create(self, spec: JobSpec) -> tuple[Job, ReferenceInfo, bool]:
        """Registers a job, or finds the one that was registered with the same spec.

        Raises:
            InvalidField: If the policy makes no sense or the world is larger than this server allows.
            JobConflict: If the name is taken by another spec.
            ReferenceUnavailable: If no scorer serves the reference model.
        """
        try:
            policy_of(spec.policy)
        except ValueError as error:
            raise InvalidField(f"spec.policy: {error}", field_name="spec.policy") from error
        if spec.world_size > self._max_world_size:
            raise InvalidField(
                f"spec.world_size is {spec.world_size}, the limit is {self._max_world_size}",
                field_name="spec.world_size",
            )
        reference = await self.reference(spec.reference_model)
        job, created = await self._store.create_job(spec, now_s=time.time())
        if job.spec != spec:
            field = next(f for f in type(spec).model_fields if getattr(spec, f) != getattr(job.spec, f))
            raise JobConflict(
                f"job {spec.name!r} exists with {field} = {getattr(job.spec, field)!r}, "
                f"this call has {getattr(spec, field)!r}; choose another name or delete the job",
                {"job": spec.name, "field": field},
            )
        return job, reference, created

    async def get(self, name: str) -> Job:
        """Finds a job.

        Raises:
            JobUnknown: If there is none of this name.
        """
        job = await self._store.get_job(name)
        if job is None:
            raise JobUnknown(f"job {name!r} does not exist; create it first", {"job": name})
        return job

    async def state(self, job: Job) -> tuple[ReferenceInfo | None, Counters]:
        """Returns what is known of a job now: its reference model, if it is served, and its accounts."""
        return await self._store.get_reference(job.spec.reference_model), await self._store.counters(job.spec.name)

    async def reference(self, name: str) -> ReferenceInfo:
        """Finds a reference model that is served now.

        Raises:
            ReferenceUnavailable: If no scorer announces it.
        """
        reference = await self._store.get_reference(name)
        if reference is None:
            raise ReferenceUnavailable(
                f"no scorer serves reference model {name!r} at the moment",
                {"reference_model": name},
                retry_after_s=REFERENCE_RETRY_S,
            )
        return reference

    async def list(self, *, after: str, limit: int) -> list[Job]:
        """Returns up to ``limit`` jobs that sort after ``after``, in order of name."""
        return await self._store.list_jobs(after=after, limit=limit)

    async def delete(self, name: str) -> bool:
        """Forgets a job and all that belongs to it; False if there was none."""
        return await self._store.delete_job(name)
