"""SuperBatchStore in this process's memory: for unit tests, and for machines without Redis or Valkey.

The same promises as the real one, except that everything is gone with the process. Its parts lie as the real one's do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jest_server.domain.errors import JobUnknown
from jest_server.domain.super_batches import SubmitStatus, SuperBatch, UploadStatus
from jest_server.stores.memory.decisions import MemoryOutcomes
from jest_server.stores.memory.state import InFlight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jest_server.domain.shards import Shard, ShardResult
    from jest_server.domain.super_batches import Limits, Submission


class MemorySuperBatchStore(MemoryOutcomes):
    """Super-batches in flight; what becomes of them, jobs, and the queue of shards are in the base classes."""

    async def submit(self, submission: Submission, *, limits: Limits, ttl_s: float, now_s: float) -> SubmitStatus:
        """See the port."""
        state = self._jobs.get(submission.job)
        if state is None:
            raise JobUnknown(f"job {submission.job!r} does not exist any more", {"job": submission.job})
        if await self.get_decision(submission.job, submission.super_batch_id):
            return SubmitStatus.DECIDED
        if submission.super_batch_id in state.letters:
            return SubmitStatus.DEAD
        held = state.in_flight.get(submission.super_batch_id)
        if held is None:
            full = limits.whose_is_reached(self._held_by(submission.job, lambda _: 1), more=1)
            if full is not None:
                return SubmitStatus(full)
            held = InFlight(submission.reference, submission.world_size, submission.step, now_s, now_s + ttl_s)
            state.in_flight[submission.super_batch_id] = held
            state.add(submitted=1, in_flight=1)
        elif (held.world_size, held.step) != (submission.world_size, submission.step):
            return SubmitStatus.CONFLICT
        earlier = held.submissions.get(submission.rank)
        if earlier is not None:
            return SubmitStatus.REPEATED if earlier.digest == submission.digest else SubmitStatus.CONFLICT
        held.submissions[submission.rank] = submission.model_copy(update={"reference": held.reference})
        return SubmitStatus.ACCEPTED

    async def get_super_batch(self, job: str, super_batch_id: str) -> SuperBatch | None:
        """See the port."""
        held = self._held(job, super_batch_id)
        if held is None:
            return None
        return SuperBatch(
            job=job,
            super_batch_id=super_batch_id,
            world_size=held.world_size,
            reference=held.reference,
            created_at_s=held.created_at_s,
            step=held.step,
            submissions=dict(held.submissions),
            uploads={rank: dict(uploads) for rank, uploads in held.uploads.items()},
            pending_shards=len(held.tokens),
        )

    async def add_upload(
        self,
        job: str,
        super_batch_id: str,
        rank: int,
        *,
        digest: str,
        positions: tuple[int, ...],
        shards: Sequence[Shard],
        limits: Limits,
    ) -> UploadStatus:
        """See the port."""
        held = self._held(job, super_batch_id)
        if held is None:
            return UploadStatus.GONE
        uploads = held.uploads.setdefault(rank, {})
        if digest in uploads:
            return UploadStatus.REPEATED
        full = limits.whose_is_reached(await self.bytes_held(job), more=sum(len(shard.features) for shard in shards))
        if full is not None:
            return UploadStatus(full)
        uploads[digest] = positions
        for shard in shards:
            self._enqueue(held, shard)
        return UploadStatus.ACCEPTED

    async def get_results(self, job: str, super_batch_id: str) -> list[ShardResult]:
        """See the port."""
        held = self._held(job, super_batch_id)
        return [] if held is None else list(held.results.values())

    async def bytes_held(self, job: str) -> Limits:
        """See the port."""
        return self._held_by(
            job, lambda held: sum(len(self._queue[token].shard.features) for token in held.tokens.values())
        )
