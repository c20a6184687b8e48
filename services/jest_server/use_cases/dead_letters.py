"""The use case of dead letters: look at them, queue one again, drop one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from jest_server.domain.dead_letters import RequeueStatus
from jest_server.domain.errors import DeadLetterUnknown, NotKept, QueueFull
from jest_server.domain.super_batches import Limits

if TYPE_CHECKING:
    from jest_server.domain.dead_letters import DeadLetter
    from jest_server.domain.ports import DecisionLog
    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.super_batches import SuperBatchRef
    from jest_server.use_cases.jobs import JobRegistry

RETRY_S = 1.0


class DeadLetters:
    """Find, requeue and drop the dead letters of jobs that exist."""

    def __init__(self, log: DecisionLog, jobs: JobRegistry) -> None:
        self._log = log
        self._jobs = jobs

    async def newest(self, job: str, *, limit: int) -> list[DeadLetter]:
        """Return the newest, newest first.

        Raises:
            JobUnknown: If there is no such job.
        """
        await self._jobs.get(job)
        return await self._log.list_dead_letters(job, limit=limit)

    async def get(self, ref: SuperBatchRef) -> DeadLetter:
        """Find one.

        Raises:
            JobUnknown, DeadLetterUnknown: If there is no such job or dead letter.
        """
        await self._jobs.get(ref.job)
        letter = await self._log.get_dead_letter(ref)
        if letter is None:
            raise _unknown(ref)
        return letter

    async def drop(self, ref: SuperBatchRef) -> None:
        """Delete one; the job's counters keep counting it.

        Raises:
            JobUnknown, DeadLetterUnknown: If there is no such job or dead letter.
        """
        await self._jobs.get(ref.job)
        if not await self._log.drop_dead_letter(ref):
            raise _unknown(ref)

    async def requeue(self, ref: SuperBatchRef) -> tuple[float, ReferenceInfo | None]:
        """Put the super-batch back in flight, for the reference model as it is served now.

        Returns:
            Its deadline in seconds since 1970, and the reference model.

        Raises:
            JobUnknown, DeadLetterUnknown: If there is no such job or dead letter.
            ReferenceUnavailable: If no scorer serves the job's reference model.
            NotKept: If what was submitted is not kept any more.
            QueueFull: If the job has as many super-batches in flight as it may.
        """
        spec = (await self._jobs.get(ref.job)).spec
        reference = await self._jobs.reference(spec)
        now_s = time.time()
        status = await self._log.requeue(
            ref,
            reference,
            limits=Limits(job=spec.max_in_flight),
            ttl_s=spec.super_batch_ttl_s,
            now_s=now_s,
        )
        if status is RequeueStatus.NO_LETTER:
            raise _unknown(ref)
        if status is RequeueStatus.FORGOTTEN:
            raise NotKept(
                f"what was submitted as {ref} is not kept any more: it is for a day, of the newest 100 dead letters",
                ref.metadata,
            )
        if status is not RequeueStatus.REQUEUED:
            raise QueueFull(
                f"super-batches in flight of job {ref.job!r} reach the limit of {spec.max_in_flight} (max_in_flight)",
                ref.metadata | {"limit": "max_in_flight"},
                retry_after_s=RETRY_S,
            )
        return now_s + spec.super_batch_ttl_s, reference


def _unknown(ref: SuperBatchRef) -> DeadLetterUnknown:
    return DeadLetterUnknown(f"job {ref.job!r} has no dead letter of super-batch {ref.super_batch_id!r}", ref.metadata)
