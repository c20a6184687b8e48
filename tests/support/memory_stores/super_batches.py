"""Super-batches in flight in this process's memory: what was submitted and uploaded, results, and events."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from typing_extensions import override

from jest_server.domain.attempts import attempt_name, attempt_number, attempt_superseded, attempt_unknown
from jest_server.domain.errors import JobUnknown
from jest_server.domain.ports import SuperBatchStore
from jest_server.domain.super_batches import SubmitResult, SubmitStatus, SuperBatch, SuperBatchEvent, UploadStatus
from support.memory_stores.state import InFlight

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from jest_server.domain.shards import Shard, ShardResult
    from jest_server.domain.super_batches import Limits, Submission, SuperBatchRef
    from support.memory_stores.state import MemoryState

EVENTS_KEPT = 4096
"""Events that a listener has not taken yet; beyond these the oldest are dropped."""


class MemorySuperBatchStore(SuperBatchStore):
    """The selector's view of the shared state."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state

    @override
    async def submit(self, submission: Submission, *, limits: Limits, ttl_s: float, now_s: float) -> SubmitResult:
        job = self._state.jobs.get(submission.job)
        if job is None:
            raise JobUnknown(f"job {submission.job!r} does not exist any more", {"job": submission.job})
        job.expire_decisions()
        if submission.super_batch_id in job.decisions:
            return SubmitResult(SubmitStatus.DECIDED)
        number, attempts = attempt_number(submission.super_batch_id), job.attempts
        if number > attempts.number:
            raise attempt_unknown(submission.job, attempt_name(number), submission.metadata)
        if 0 < number < attempts.number:
            current, opened_by = attempt_name(attempts.number), attempts.current.opened_by
            raise attempt_superseded(submission.job, current, opened_by, submission.metadata)
        if submission.super_batch_id in job.dead_letters:
            return SubmitResult(SubmitStatus.DEAD)
        held = job.in_flight.get(submission.super_batch_id)
        if held is None:
            full = limits.first_exceeded(self._state.sums(submission.job, lambda _: 1), more=1)
            if full is not None:
                return SubmitResult(SubmitStatus(full))
            held = InFlight(submission.reference, submission.world_size, submission.step, now_s, now_s + ttl_s)
            job.in_flight[submission.super_batch_id] = held
            job.add(submitted=1, in_flight=1)
        earlier = held.submissions.get(submission.rank)
        agrees = (held.world_size, held.step) == (submission.world_size, submission.step)
        if not agrees or (earlier is not None and earlier.digest != submission.digest):
            return SubmitResult(SubmitStatus.CONFLICT, held.reference, held.step)
        if earlier is None:
            held.submissions[submission.rank] = submission.model_copy(update={"reference": held.reference})
            return SubmitResult(SubmitStatus.ACCEPTED, held.reference, held.step)
        uploads = held.uploads.get(submission.rank, {}).values()
        uploaded = frozenset(position for positions in uploads for position in positions)
        return SubmitResult(SubmitStatus.REPEATED, held.reference, held.step, uploaded)

    @override
    async def get_super_batch(self, ref: SuperBatchRef) -> SuperBatch | None:
        held = self._state.in_flight(ref)
        if held is None:
            return None
        return SuperBatch(
            job=ref.job,
            super_batch_id=ref.super_batch_id,
            world_size=held.world_size,
            reference=held.reference,
            created_at_s=held.created_at_s,
            step=held.step,
            submissions=dict(held.submissions),
            uploads={rank: dict(uploads) for rank, uploads in held.uploads.items()},
            pending_shards=len(held.shards),
        )

    @override
    async def row_counts(self, ref: SuperBatchRef, ranks: Iterable[int]) -> dict[int, int]:
        held = self._state.in_flight(ref)
        submissions = {} if held is None else held.submissions
        return {rank: len(submissions[rank].keys) for rank in ranks if rank in submissions}

    @override
    async def add_upload(
        self,
        ref: SuperBatchRef,
        rank: int,
        *,
        digest: str,
        positions: tuple[int, ...],
        shards: Sequence[Shard],
        limits: Limits,
    ) -> UploadStatus:
        held = self._state.in_flight(ref)
        if held is None:
            return UploadStatus.GONE
        uploads = held.uploads.setdefault(rank, {})
        if digest in uploads:
            return UploadStatus.REPEATED
        full = limits.first_exceeded(await self.bytes_held(ref.job), more=sum(len(shard.features) for shard in shards))
        if full is not None:
            return UploadStatus(full)
        uploads[digest] = positions
        for shard in shards:
            self._state.enqueue(held, shard)
        return UploadStatus.ACCEPTED

    @override
    async def get_results(self, ref: SuperBatchRef) -> list[ShardResult]:
        held = self._state.in_flight(ref)
        return [] if held is None else list(held.results.values())

    @override
    async def bytes_held(self, job: str) -> Limits:
        queued = self._state.queued
        return self._state.sums(job, lambda held: sum(len(queued[name].shard.features) for name in held.shards))

    @override
    async def events(self) -> AsyncIterator[SuperBatchEvent]:
        mailbox: asyncio.Queue[SuperBatchEvent] = asyncio.Queue(EVENTS_KEPT)
        self._state.listeners.add(mailbox)
        try:
            while True:
                yield await mailbox.get()
        finally:
            self._state.listeners.discard(mailbox)
