"""What the in-memory stores share: jobs, super-batches in flight, model queues and listeners, as plain data.

Everything happens on one event loop, so each step between two awaits is atomic.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from typing_extensions import override

from jest_server.domain.ports import StoreConnection
from jest_server.domain.storage import MemoryUse
from jest_server.domain.super_batches import Limits, SuperBatchEvent, SuperBatchRef
from jest_server.domain.tenants import prefix_of
from support.memory_stores.attempts import Attempts
from support.memory_stores.model_queue import ModelQueue, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from jest_server.domain.dead_letters import DeadLetter
    from jest_server.domain.decisions import Decision
    from jest_server.domain.jobs import Job
    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.shards import Shard, ShardResult
    from jest_server.domain.super_batches import Submission

Version = tuple[str, str]
"""Name and version of a reference model."""


class MemoryState(StoreConnection):
    """All state of the in-memory stores, and the steps that more than one of them takes."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobState] = {}
        self.references: dict[Version, AnnouncedVersion] = {}
        self.fingerprints: dict[Version, bytes] = {}
        self.queued: dict[str, QueuedShard] = {}
        """By name: shards that wait or are being scored."""
        self.model_queues: dict[Version, ModelQueue] = {}
        self.shard_arrived = asyncio.Event()
        self.listeners: set[asyncio.Queue[SuperBatchEvent]] = set()

    @override
    async def ping(self) -> None:
        return

    @override
    async def memory(self) -> MemoryUse:
        """Count features and results alone."""
        held = (super_batch for job in self.jobs.values() for super_batch in job.in_flight.values())
        results = sum(len(result.embeddings) for each in held for result in each.results.values())
        features = sum(len(queued.shard.features) for queued in self.queued.values())
        return MemoryUse(used_bytes=features + results, max_bytes=0)

    @override
    async def close(self) -> None:
        return

    def in_flight(self, ref: SuperBatchRef) -> InFlight | None:
        """Return the super-batch if it is in flight."""
        job = self.jobs.get(ref.job)
        return None if job is None else job.in_flight.get(ref.super_batch_id)

    def model_queue(self, version: Version) -> ModelQueue:
        """Return the queue of shards for a version of a reference model."""
        return self.model_queues.setdefault(version, ModelQueue())

    def enqueue(self, held: InFlight, shard: Shard) -> None:
        """Queue a new shard of a super-batch."""
        held.shards.add(shard.name)
        self.queued[shard.name] = queued = QueuedShard(shard, time.time(), held.deadline_s)
        self.put_back(queued)

    def put_back(self, queued: QueuedShard) -> None:
        """Let a shard wait, and wake the consumers that wait for one."""
        self.model_queue(queued.version).put(queued.shard.job, queued.place)
        self.shard_arrived.set()  # wakes those that wait now ...
        self.shard_arrived.clear()  # ... and no later ones

    def dequeue(self, name: str) -> None:
        """Remove a shard from the queue, whether it waits or is being scored."""
        queued = self.queued.pop(name)
        if queued.consumer is None:
            self.model_queue(queued.version).take_out(queued.shard.job, queued.place)

    def leave_flight(self, job: JobState, super_batch_id: str) -> None:
        """Take a super-batch out of flight with all that it held, and publish the event."""
        for name in job.in_flight.pop(super_batch_id).shards:
            self.dequeue(name)
        self.publish(SuperBatchRef(job.job.spec.name, super_batch_id))

    def publish(self, ref: SuperBatchRef) -> None:
        """Put an event into every listener's mailbox; a full one loses its oldest."""
        for mailbox in self.listeners:
            if mailbox.full():
                mailbox.get_nowait()
            mailbox.put_nowait(SuperBatchEvent(ref))

    def sums(self, job: str, amount: Callable[[InFlight], int]) -> Limits:
        """Sum an amount over the super-batches in flight of a job, of its tenant, and of all."""
        tenant = prefix_of(job)
        sums = {name: sum(amount(held) for held in state.in_flight.values()) for name, state in self.jobs.items()}
        of_tenant = sum(held for name, held in sums.items() if tenant and name.startswith(tenant))
        return Limits(job=sums.get(job, 0), tenant=of_tenant, server=sum(sums.values()))


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
    shards: set[str] = field(default_factory=set)
    """Names of the shards to score."""
    results: dict[str, ShardResult] = field(default_factory=dict)


@dataclass
class JobState:
    """A job and all that belongs to it."""

    job: Job
    attempts: Attempts = field(default_factory=Attempts)
    counters: dict[str, int] = field(default_factory=dict)
    in_flight: dict[str, InFlight] = field(default_factory=dict)
    decisions: dict[str, tuple[Decision, float]] = field(default_factory=dict)
    """By super-batch id: the decision and its end."""
    ends: list[tuple[float, str]] = field(default_factory=list)
    """Heap of the decisions' ends."""
    dead_letters: dict[str, DeadLetter] = field(default_factory=dict)
    kept_inputs: dict[str, InFlight] = field(default_factory=dict)
    """By super-batch id: what was submitted of those that were dead-lettered."""

    def oldest_dead_letter(self, among: Iterable[str]) -> str:
        """Return the super-batch of these whose dead letter is the oldest."""
        return min(among, key=lambda name: (self.dead_letters[name].at_s, name))

    def add(self, **increments: int) -> None:
        """Change the counters."""
        for name, increment in increments.items():
            self.counters[name] = self.counters.get(name, 0) + increment

    def expire_decisions(self) -> None:
        """Drop the decisions that were kept for as long as asked."""
        while self.ends and self.ends[0][0] <= time.monotonic():
            del self.decisions[heapq.heappop(self.ends)[1]]


@dataclass
class AnnouncedVersion:
    """A version of a reference model: since when it was announced, and until when."""

    info: ReferenceInfo
    since: float
    until: float = 0.0

    @property
    def served(self) -> bool:
        """Whether scorers serve it at the moment."""
        return time.monotonic() < self.until


@dataclass
class QueuedShard:
    """A shard that is queued or being scored."""

    shard: Shard
    queued_at_s: float
    deadline_s: float
    deliveries: int = 0
    consumer: str | None = None
    heartbeat_at: float = 0.0

    @property
    def version(self) -> Version:
        """For which version of which reference model it is."""
        return self.shard.reference_model, self.shard.reference_version

    @property
    def place(self) -> Place:
        """Return its place in the order of its job's shards."""
        return self.deadline_s, self.shard.name
