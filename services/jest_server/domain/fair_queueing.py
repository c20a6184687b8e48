"""Weighted start-time fair queueing: which of the jobs that wait for the same resource is served next.

After Goyal, Vin and Cheng, "Start-time fair queueing" (SIGCOMM 1996): a job is a flow, and a piece of its work has a
cost. Shards in Redis are served in the same order by `stores/redis/lua/fair_queue.lua`.
"""

from __future__ import annotations

import math


class StartTimeFairQueue:
    """The order in which jobs that wait are served; no clock and no randomness, so equal calls give equal orders.

    Virtual time is the work that every busy job has been given since the start. A job's turn is the virtual time at
    which its next piece may start: now if the job was idle, else when its last piece would have ended had the jobs
    shared evenly. The earliest turn is first. While two jobs both wait, the costs charged to them differ by no more
    than their two largest together. A job that was idle gets no credit for it.
    """

    def __init__(self) -> None:
        self._turns: dict[str, float] = {}
        self._past: dict[str, float] = {}
        self._now = 0.0

    def __contains__(self, job: str) -> bool:
        return job in self._turns

    def of(self, job: str) -> float:
        """The virtual time of the next turn of a job that waits."""
        return self._turns[job]

    def first(self) -> str | None:
        """The job that is next, of those with equal turns the first by name; None if no job waits. O(jobs)."""
        return min(self._turns, key=lambda job: (self._turns[job], job), default=None)

    def join(self, job: str) -> None:
        """Add a job that waits; one that waits already keeps its turn."""
        if job not in self._turns:
            self._turns[job] = max(self._now, self._past.pop(job, 0.0))

    def take(self, job: str, *, cost: float) -> None:
        """Charge a waiting job for the piece of work that it starts now.

        Raises:
            ValueError: If the cost is not a finite number larger than 0: work for nothing would always be first.
        """
        check_cost(cost)
        self._now = self._turns[job]
        self._turns[job] += cost
        self._past = {job: turn for job, turn in self._past.items() if turn > self._now}

    def leave(self, job: str) -> None:
        """Remove a job that has no more work; what it was charged for stays charged."""
        turn = self._turns.pop(job, self._now)
        if turn > self._now:
            self._past[job] = turn

    def forget(self, job: str) -> None:
        """Forget what a job that does not wait was charged for."""
        self._past.pop(job, None)


def check_cost(cost: float) -> None:
    """Check that a cost can be charged.

    Raises:
        ValueError: If the cost is not a finite number larger than 0.
    """
    if not (math.isfinite(cost) and cost > 0):
        raise ValueError(f"cost is {cost}, expected a finite number larger than 0")
