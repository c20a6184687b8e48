"""Joins a rank's process to a run of its job's training loop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from jest_server.domain.attempts import OpenStatus, attempt_number, attempt_superseded, attempt_unknown
from jest_server.domain.errors import InvalidField
from jest_server.selector.intake.request import check_rank

if TYPE_CHECKING:
    from jest_server.domain.attempts import AttemptRequest
    from jest_server.domain.ports import DecisionLog, JobStore
    from jest_server.runtime.metrics import SelectorMetrics
    from jest_server.use_cases.jobs import JobRegistry


class OpenAttempt:
    """Gives all ranks of one start the same attempt, and each start another one."""

    def __init__(self, jobs: JobRegistry, store: JobStore, decisions: DecisionLog, metrics: SelectorMetrics) -> None:
        self._jobs = jobs
        self._store = store
        self._decisions = decisions
        self._metrics = metrics

    async def run(self, request: AttemptRequest) -> str:
        """Return the attempt that the process belongs to; a new one supersedes what earlier ones left in flight.

        Raises:
            JobUnknown: If there is no such job.
            InvalidField: If rank, world size, parent or parent step are not those of the job or the other ranks.
            AttemptUnknown: If the parent is not an attempt of the job.
            AttemptSuperseded: If a newer process opened the next attempt.
        """
        spec = (await self._jobs.get(request.job)).spec
        check_rank(request.rank, request.world_size, spec)
        metadata = {"job": request.job, "rank": str(request.rank)}
        result = await self._store.open_attempt(request)
        match result.status:
            case OpenStatus.UNKNOWN_PARENT:
                raise attempt_unknown(request.job, request.parent, metadata)
            case OpenStatus.SUPERSEDED:
                raise attempt_superseded(request.job, result.attempt, result.opened_by, metadata)
            case OpenStatus.MISMATCH:
                names = ("world_size", "parent", "parent_step")
                pairs = zip(names, request.origin, result.origin, strict=True)
                field, here, there = next(pair for pair in pairs if pair[1] != pair[2])
                raise InvalidField(
                    f"{field} is {here!r}, expected {there!r}, with which attempt {result.attempt!r} of job "
                    f"{request.job!r} was opened",
                    metadata,
                    field_name=field,
                )
            case OpenStatus.OPENED:
                number = attempt_number(result.attempt)
                for letter in await self._decisions.dead_letter_superseded(request.job, number, now_s=time.time()):
                    self._metrics.dead_lettered(letter)
        return result.attempt
