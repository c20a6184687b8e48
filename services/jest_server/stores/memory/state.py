"""What the in-memory store knows of a job and of a super-batch in flight: plain data, and the upkeep of it."""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jest_server.domain.dead_letters import DeadLetter
    from jest_server.domain.decisions import Decision
    from jest_server.domain.jobs import Job
    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.shards import ShardResult
    from jest_server.domain.super_batches import Submission


@dataclass
class InFlight:
    """A super-batch without a decision."""

    reference: ReferenceInfo | None
    world_size: int
    step: int | None
    created_at_s: float
    deadline_s: float
    submissions: dict[int, Submission] = field(default_factory=dict)
    uploads: dict[int, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    """By shard id: the queue's handle of each shard to score."""
    results: dict[str, ShardResult] = field(default_factory=dict)


@dataclass
class JobState:
    """A job and all that belongs to it."""

    job: Job
    counters: dict[str, int] = field(default_factory=dict)
    in_flight: dict[str, InFlight] = field(default_factory=dict)
    decisions: dict[str, tuple[Decision, float]] = field(default_factory=dict)
    """By super-batch id: the decision and its end."""
    ends: list[tuple[float, str]] = field(default_factory=list)
    """Heap of the decisions' ends."""
    letters: dict[str, DeadLetter] = field(default_factory=dict)
    set_aside: dict[str, InFlight] = field(default_factory=dict)
    """By super-batch id: what was submitted of those that were dead-lettered."""

    def oldest_letter(self, among: Iterable[str]) -> str:
        """Of some super-batches the one whose letter was written first."""
        return min(among, key=lambda name: (self.letters[name].at_s, name))

    def add(self, **increments: int) -> None:
        """Changes the accounts."""
        for name, increment in increments.items():
            self.counters[name] = self.counters.get(name, 0) + increment

    def forget_decisions(self) -> None:
        """Drops the decisions that were kept for as long as asked."""
        while self.ends and self.ends[0][0] <= time.monotonic():
            del self.decisions[heapq.heappop(self.ends)[1]]
