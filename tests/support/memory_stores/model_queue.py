"""The shards that wait for one version of a reference model, in this process's memory: see lua/fair_queue.lua."""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING

from jest_server.domain.fair_queueing import StartTimeFairQueue

if TYPE_CHECKING:
    from collections.abc import Callable

Place = tuple[float, str]
"""Deadline and name of a shard: a job's shards are served in this order."""


class ModelQueue:
    """Jobs share by weight; inside a job the earliest deadline is first."""

    def __init__(self) -> None:
        self._turns = StartTimeFairQueue()
        self._waiting: dict[str, list[Place]] = {}

    def put(self, job: str, place: Place) -> None:
        """Add a shard."""
        insort(self._waiting.setdefault(job, []), place)
        self._turns.join(job)

    def take_out(self, job: str, place: Place) -> None:
        """Remove a waiting shard without charging its job."""
        self._waiting[job].remove(place)
        self._leave_if_done(job)

    def take_first(self, weight_of: Callable[[str], float]) -> Place | None:
        """Remove and return the next shard; None if none waits."""
        job = self._turns.first()
        if job is None:
            return None
        place = self._waiting[job].pop(0)
        self._turns.take(job, cost=1 / weight_of(job))
        self._leave_if_done(job)
        return place

    def forget(self, job: str) -> None:
        """Forget the virtual time of a job that has no shard here."""
        self._turns.forget(job)

    def _leave_if_done(self, job: str) -> None:
        if not self._waiting[job]:
            del self._waiting[job]
            self._turns.leave(job)
