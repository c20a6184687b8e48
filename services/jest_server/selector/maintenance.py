"""What the selector does by the clock rather than for a call."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from jest_server.runtime.logs import get_logger

if TYPE_CHECKING:
    from jest_server.domain.ports import EmbeddingCache, Stores
    from jest_server.runtime.metrics import SelectorMetrics
    from jest_server.selector.learner_outputs.pending_selections import PendingSelections

UNSERVED_GRACE_S: Final = 60.0
"""How long a reference model's version may be unserved, while another is served, before super-batches that wait for it
are dead-lettered."""

_log = get_logger()


class Maintenance:
    """Dead-letters stale super-batches and keeps the gauges up to date."""

    def __init__(
        self, stores: Stores, cache: EmbeddingCache, selections: PendingSelections, metrics: SelectorMetrics
    ) -> None:
        self._stores = stores
        self._cache = cache
        self._selections = selections
        self._metrics = metrics

    async def dead_letter_stale(self) -> None:
        """Dead-letter super-batches that were not decided in time, or whose reference version is gone."""
        letters = await self._stores.decisions.dead_letter_overdue(now_s=time.time())
        letters += await self._stores.decisions.dead_letter_unserved(grace_s=UNSERVED_GRACE_S, now_s=time.time())
        for letter in letters:
            self._metrics.dead_lettered(letter)
            _log.warning(
                "super-batch dead-lettered", job=letter.job, super_batch=letter.super_batch_id, reason=letter.reason
            )

    async def forget_ended_jobs(self) -> None:
        """Remove the series of jobs that do not exist any more, or that have been idle for long."""
        for job in self._metrics.jobs.named:
            if self._metrics.jobs.is_idle(job) or await self._stores.jobs.get_job(job) is None:
                self._metrics.jobs.forget(job)

    async def observe_work(self) -> None:
        """Set the gauges of what is queued and pending."""
        self._metrics.queue_depth.set(await self._stores.queue.depth())
        self._metrics.queue_age.set(await self._stores.queue.oldest_age_s(now_s=time.time()))
        self._metrics.pending_selections.set(len(self._selections))
        self._metrics.held_bytes.set(self._selections.held_bytes)

    async def observe_memory(self) -> None:
        """Set the gauges of the memory that the store and the cache use."""
        self._metrics.observe_memory(await self._stores.connection.memory(), await self._cache.stats())
