"""Waits for what a decision is made from: the learner outputs of all ranks, then the reference embeddings."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from jest_server.domain.errors import ReferenceTimeout
from jest_server.domain.policies import policy_of
from jest_server.selector.decide.join_reference import JoinedReference, join_reference
from jest_server.selector.not_in_flight import not_in_flight_error

if TYPE_CHECKING:
    from jest_server.domain.jobs import JobSpec
    from jest_server.domain.ports import DecisionLog, EmbeddingCache, SuperBatchStore
    from jest_server.domain.super_batches import SuperBatch, SuperBatchRef
    from jest_server.selector.decide.event_listener import EventListener
    from jest_server.selector.learner_outputs.pending_selections import PendingSelection

POLL_S: Final = 1.0
"""How long a wait for an event lasts before the store is asked; it matters only if an event was lost."""
RETRY_S: Final = 0.5


class DecisionInputs:
    """Waits for as long as the super-batch is in flight, and for its reference embeddings within the job's timeout."""

    def __init__(
        self, super_batches: SuperBatchStore, decisions: DecisionLog, cache: EmbeddingCache, listener: EventListener
    ) -> None:
        self._super_batches = super_batches
        self._decisions = decisions
        self._cache = cache
        self._listener = listener

    async def wait_for_ranks(self, pending: PendingSelection) -> None:
        """Return once all ranks' outputs have arrived.

        Raises:
            SuperBatchUnknown, DeadLettered: If the super-batch is not in flight any more.
        """
        while not await _is_set(pending.complete, within_s=POLL_S * 5):
            await self._super_batch(pending.ref)

    async def wait_for_reference(
        self, ref: SuperBatchRef, spec: JobSpec
    ) -> tuple[SuperBatch, JoinedReference | None, str]:
        """Return the super-batch with its reference embeddings, or with the reason for the fallback.

        Raises:
            ReferenceTimeout: If the embeddings are late and the job has no fallback.
            ReferenceMissing: If some are gone, or were never uploaded.
            SuperBatchUnknown, DeadLettered: If the super-batch is not in flight any more.
        """
        give_up_at = time.monotonic() + spec.reference_timeout_s
        with self._listener.events_of(ref) as event:
            while True:
                event.clear()
                super_batch = await self._super_batch(ref)
                if not policy_of(spec.policy).needs_reference_model:
                    return super_batch, None, ""
                if super_batch.pending_shards == 0:
                    return super_batch, await join_reference(self._super_batches, self._cache, super_batch), ""
                left_s = give_up_at - time.monotonic()
                if left_s <= 0:
                    return super_batch, None, _timeout_reason(spec, super_batch)
                await _is_set(event, within_s=min(left_s, POLL_S))

    async def _super_batch(self, ref: SuperBatchRef) -> SuperBatch:
        super_batch = await self._super_batches.get_super_batch(ref)
        if super_batch is None:
            raise await not_in_flight_error(self._decisions, ref)
        return super_batch


def _timeout_reason(spec: JobSpec, super_batch: SuperBatch) -> str:
    reason = (
        f"{super_batch.pending_shards} shards of super-batch {super_batch.super_batch_id!r} were not scored within "
        f"reference_timeout ({spec.reference_timeout_s:g} s)"
    )
    if spec.fallback == "fail":
        raise ReferenceTimeout(
            f"{reason}; job {spec.name!r} has no fallback", super_batch.ref.metadata, retry_after_s=RETRY_S
        )
    return reason


async def _is_set(event: asyncio.Event, *, within_s: float) -> bool:
    """Wait for an event, up to `within_s` seconds, and return whether it is set."""
    try:
        async with asyncio.timeout(within_s):
            return await event.wait()
    except TimeoutError:
        return False
