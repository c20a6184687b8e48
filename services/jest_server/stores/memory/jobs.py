"""Jobs, their accounts, and the reference models that scorers serve, in this process's memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jest_server.domain.jobs import Counters, Job
from jest_server.domain.references import Announced
from jest_server.stores.memory.shard_queue import MemoryShardQueue
from jest_server.stores.memory.state import JobState

if TYPE_CHECKING:
    from jest_server.domain.jobs import JobSpec
    from jest_server.domain.references import ReferenceInfo


class MemoryRegistry(MemoryShardQueue):
    """What is registered and announced; the queue of shards is in the base class."""

    def __init__(self) -> None:
        super().__init__()
        self._references: dict[tuple[str, str], _Version] = {}

    async def create_job(self, spec: JobSpec, *, now_s: float) -> tuple[Job, bool]:
        """See the port."""
        state = self._jobs.get(spec.name)
        if state is not None:
            return state.job, False
        job = Job(spec=spec, created_at_s=now_s)
        self._jobs[spec.name] = JobState(job)
        return job, True

    async def get_job(self, name: str) -> Job | None:
        """See the port."""
        state = self._jobs.get(name)
        return None if state is None else state.job

    async def list_jobs(self, *, after: str, limit: int) -> list[Job]:
        """See the port."""
        return [self._jobs[name].job for name in sorted(self._jobs) if name > after][:limit]

    async def delete_job(self, name: str) -> bool:
        """See the port."""
        state = self._jobs.pop(name, None)
        if state is None:
            return False
        for super_batch_id in list(state.in_flight):
            self._let_go(state, super_batch_id)
        for line in self._lines.values():
            line.forget(name)
        return True

    async def counters(self, name: str) -> Counters:
        """See the port."""
        state = self._jobs.get(name)
        return Counters() if state is None else Counters.model_validate(state.counters)

    async def announce_reference(self, info: ReferenceInfo, *, ttl_s: float) -> None:
        """See the port."""
        now = time.monotonic()
        known = self._references.setdefault((info.name, info.version), _Version(info, since=now))
        known.info, known.until = info, now + ttl_s

    async def get_reference(self, name: str) -> ReferenceInfo | None:
        """See the port."""
        served = [known for known in self._references.values() if known.info.name == name and known.served]
        return max(served, key=lambda known: known.since).info if served else None

    async def list_references(self) -> list[Announced]:
        """See the port."""
        known = sorted(self._references.values(), key=lambda known: (known.info.name, -known.since))
        offset_s = time.time() - time.monotonic()
        return [Announced(reference=known.info, since_s=known.since + offset_s, served=known.served) for known in known]


@dataclass
class _Version:
    """A version of a reference model: since when it was announced, and until when."""

    info: ReferenceInfo
    since: float
    until: float = 0.0

    @property
    def served(self) -> bool:
        return time.monotonic() < self.until
