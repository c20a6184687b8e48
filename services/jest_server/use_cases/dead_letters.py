"""The use case of dead letters: look at them, queue one again, drop one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from jest_server.domain.dead_letters import RequeueStatus
from jest_server.domain.errors import DeadLetterUnknown, NotKept, QueueFull
from jest_server.domain.super_batches import Limits

if TYPE_CHECKING:
    from jest_server.domain.dead_letters import DeadLetter
    from jest_server.domain.ports import SuperBatchStore
    from jest_server.domain.references import ReferenceInfo
    from jest_server.use_cases.jobs import Jobs

RETRY_S = 1.0


class DeadLetters:
    """Finds, requeues and drops the dead letters of jobs that exist."""

    def __init__(self, store: SuperBatchStore, jobs: Jobs) -> None:
        self._store = store
        self._jobs = jobs

    async def newest(self, job: str, *, limit: int) -> list[DeadLetter]:
        """Returns the newest, newest first.

        Raises:
            JobUnknown: If there is no such job.
        """
        await self._jobs.get(job)
        return await self._store.list_dead_letters(job, limit=limit)

    async def get(self, job: str, super_batch_id: str) -> DeadLetter:
        """Finds one.

        Raises:
            JobUnknown, DeadLetterUnknown: As their names say.
        """
        await self._jobs.get(job)
        letter = await self._store.get_dead_letter(job, super_batch_id)
        if letter is None:
            raise _unknown(job, super_batch_id)
        return letter

    async def drop(self, job: str, super_batch_id: str) -> None:
        """Forgets one; the job's accounts go on counting it.

        Raises:
            JobUnknown, DeadLetterUnknown: As their names say.
        """
        await self._jobs.get(job)
        if not await self._store.drop_dead_letter(job, super_batch_id):
            raise _unknown(job, super_batch_id)

    async def requeue(self, job: str, super_batch_id: str) -> tuple[float, ReferenceInfo | None]:
        """Puts the super-batch back in flight, for the reference model as it is served now.

        Returns:
            Its deadline in seconds since 1970, and the reference model.

        Raises:
            JobUnknown, DeadLetterUnknown, ReferenceUnavailable: As their names say.
            NotKept: If what was submitted is not kept any more.
            QueueFull: If the job has as many super-batches in flight as it may.
        """
        spec = (await self._jobs.get(job)).spec
        reference = await self._jobs.reference(spec)
        now_s = time.time()
        status = await self._store.requeue(
            job,
            super_batch_id,
            reference,
            limits=Limits(job=spec.max_in_flight),
            ttl_s=spec.super_batch_ttl_s,
            now_s=now_s,
        )
        context = {"job": job, "super_batch_id": super_batch_id}
        if status is RequeueStatus.NO_LETTER:
            raise _unknown(job, super_batch_id)
        if status is RequeueStatus.FORGOTTEN:
            raise NotKept(
                f"what was submitted as super-batch {super_batch_id!r} of job {job!r} is not kept any more: it is for "
                "a day, of the newest 100 dead letters",
                context,
            )
        if status is not RequeueStatus.REQUEUED:
            raise QueueFull(
                f"super-batches in flight of job {job!r} reach the limit of {spec.max_in_flight} (max_in_flight)",
                context | {"limit": "max_in_flight"},
                retry_after_s=RETRY_S,
            )
        return now_s + spec.super_batch_ttl_s, reference


def _unknown(job: str, super_batch_id: str) -> DeadLetterUnknown:
    context = {"job": job, "super_batch_id": super_batch_id}
    return DeadLetterUnknown(f"job {job!r} has no dead letter of super-batch {super_batch_id!r}", context)
