"""SuperBatchStore in this process's memory: for unit tests, and for machines without Redis or Valkey.

The same promises as the real one, except that everything is gone with the process.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jest_server.adapters.memory_line import Line, Place
from jest_server.errors import DeadLettered, JobUnknown, SuperBatchUnknown
from jest_server.model import (
    DECISIONS_KEPT,
    Announced,
    Claim,
    Counters,
    DeadLetter,
    Decision,
    Job,
    JobSpec,
    Limits,
    LineState,
    MemoryUse,
    News,
    ReferenceInfo,
    RequeueStatus,
    Shard,
    ShardResult,
    Submission,
    SubmitStatus,
    SuperBatch,
    UploadStatus,
)
from jest_server.security.tenants import prefix_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

LETTERS_KEPT = 1000
SET_ASIDE_KEPT = 100
NEWS_KEPT = 4096
"""Of what a listener has not taken yet; the oldest go first."""


_VersionName = tuple[str, str]


@dataclass
class _InFlight:
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
class _Queued:
    """A shard that is queued or being scored."""

    shard: Shard
    queued_at_s: float
    place: Place
    deliveries: int = 0
    consumer: str | None = None
    touched_at: float = 0.0
    turn: int = 0
    """Number of the claim that took it; shards in others' hands are taken over in this order."""

    @property
    def version(self) -> _VersionName:
        return self.shard.reference_model, self.shard.reference_version


@dataclass
class _Announced:
    """A version of a reference model: since when it was announced, and until when."""

    info: ReferenceInfo
    since: float
    until: float = 0.0


@dataclass
class _JobState:
    """A job and all that belongs to it."""

    job: Job
    counters: dict[str, int] = field(default_factory=dict)
    in_flight: dict[str, _InFlight] = field(default_factory=dict)
    decisions: dict[str, tuple[Decision, float]] = field(default_factory=dict)
    """By super-batch id: the decision and its end."""
    ends: list[tuple[float, str]] = field(default_factory=list)
    """Heap of the decisions' ends."""
    letters: dict[str, DeadLetter] = field(default_factory=dict)
    set_aside: dict[str, _InFlight] = field(default_factory=dict)
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


class MemorySuperBatchStore:
    """Jobs, super-batches, the queue and decisions of one event loop."""

    def __init__(self) -> None:
        self._jobs: dict[str, _JobState] = {}
        self._references: dict[_VersionName, _Announced] = {}
        self._queue: dict[str, _Queued] = {}
        self._lines: dict[_VersionName, Line] = {}
        self._tokens = 0
        self._turns = 0
        self._queued = asyncio.Event()
        self._listeners: set[asyncio.Queue[News]] = set()

    async def ping(self) -> None:
        """See the port."""

    async def close(self) -> None:
        """See the port."""

    # Jobs

    async def create_job(self, spec: JobSpec, *, now_s: float) -> tuple[Job, bool]:
        """See the port."""
        state = self._jobs.get(spec.name)
        if state is not None:
            return state.job, False
        job = Job(spec=spec, created_at_s=now_s)
        self._jobs[spec.name] = _JobState(job)
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

    # Reference models

    async def announce_reference(self, info: ReferenceInfo, *, ttl_s: float) -> None:
        """See the port."""
        now = time.monotonic()
        known = self._references.setdefault((info.name, info.version), _Announced(info, since=now))
        known.info, known.until = info, now + ttl_s

    async def get_reference(self, name: str) -> ReferenceInfo | None:
        """See the port."""
        served = [known for known in self._references.values() if known.info.name == name and self._served(known)]
        return max(served, key=lambda known: known.since).info if served else None

    async def list_references(self) -> list[Announced]:
        """See the port."""
        known = sorted(self._references.values(), key=lambda known: (known.info.name, -known.since))
        offset_s = time.time() - time.monotonic()
        return [
            Announced(reference=known.info, since_s=known.since + offset_s, served=self._served(known))
            for known in known
        ]

    # Super-batches

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
            held = _InFlight(submission.reference, submission.world_size, submission.step, now_s, now_s + ttl_s)
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

    async def get_dead_letter(self, job: str, super_batch_id: str) -> DeadLetter | None:
        """See the port."""
        state = self._jobs.get(job)
        return None if state is None else state.letters.get(super_batch_id)

    async def list_dead_letters(self, job: str, *, limit: int) -> list[DeadLetter]:
        """See the port."""
        state = self._jobs.get(job)
        letters = [] if state is None else list(state.letters.values())
        return sorted(letters, key=lambda letter: (letter.at_s, letter.super_batch_id), reverse=True)[:limit]

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

    async def bytes_held(self, job: str) -> Limits:
        """See the port."""
        return self._held_by(
            job, lambda held: sum(len(self._queue[token].shard.features) for token in held.tokens.values())
        )

    async def get_results(self, job: str, super_batch_id: str) -> list[ShardResult]:
        """See the port."""
        held = self._held(job, super_batch_id)
        return [] if held is None else list(held.results.values())

    async def decide(self, decision: Decision, *, keep_s: float, keep_count: int = DECISIONS_KEPT) -> Decision:
        """See the port."""
        job, super_batch_id = decision.job, decision.super_batch_id
        recorded = await self.get_decision(job, super_batch_id)
        if recorded is not None:
            return recorded
        state, context = self._jobs.get(job), {"job": job, "super_batch_id": super_batch_id}
        if state is not None and super_batch_id in state.letters:
            raise DeadLettered(f"super-batch {super_batch_id!r} of job {job!r} was set aside", context)
        if state is None or super_batch_id not in state.in_flight:
            raise SuperBatchUnknown(f"super-batch {super_batch_id!r} of job {job!r} is not in flight", context)
        until = time.monotonic() + keep_s
        state.decisions[super_batch_id] = (decision, until)
        heapq.heappush(state.ends, (until, super_batch_id))
        while len(state.ends) > keep_count:
            del state.decisions[heapq.heappop(state.ends)[1]]
        state.add(
            selected=1,
            in_flight=-1,
            fallbacks=int(decision.fallback is not None),
            examples_loaded=decision.super_batch_size,
            examples_selected=decision.sub_batch_size,
            cache_hits=decision.cache_hits,
            reference_inferences=decision.reference_inferences,
        )
        self._let_go(state, super_batch_id)
        return decision

    async def get_decision(self, job: str, super_batch_id: str) -> Decision | None:
        """See the port."""
        state = self._jobs.get(job)
        if state is None:
            return None
        state.forget_decisions()
        decision, _ = state.decisions.get(super_batch_id, (None, 0.0))
        return decision

    async def list_decisions(self, job: str, *, before: str, limit: int) -> tuple[list[Decision], str]:
        """See the port."""
        state = self._jobs.get(job)
        if state is None:
            return [], ""
        state.forget_decisions()
        found = sorted((f"{until:020.6f}:{name}" for name, (_, until) in state.decisions.items()), reverse=True)
        page = [place for place in found if not before or place < before][: limit + 1]
        decisions = [state.decisions[place.partition(":")[2]][0] for place in page[:limit]]
        return decisions, page[limit - 1] if len(page) > limit else ""

    async def lines(self) -> list[LineState]:
        """See the port."""
        states = []
        for model, version in sorted({queued.version for queued in self._queue.values()}):
            queued = [queued for queued in self._queue.values() if queued.version == (model, version)]
            waiting = Counter(queued.shard.job for queued in queued if queued.consumer is None)
            scoring = sum(queued.consumer is not None for queued in queued)
            states.append(LineState(model=model, version=version, waiting=dict(waiting), scoring=scoring))
        return states

    async def dead_letter(self, letter: DeadLetter) -> bool:
        """See the port."""
        state = self._jobs.get(letter.job)
        if state is None or letter.super_batch_id not in state.in_flight:
            return False
        state.add(dead_lettered=1, in_flight=-1)
        state.letters[letter.super_batch_id] = letter
        state.set_aside[letter.super_batch_id] = state.in_flight[letter.super_batch_id]
        self._let_go(state, letter.super_batch_id)
        while len(state.set_aside) > SET_ASIDE_KEPT:
            del state.set_aside[state.oldest_letter(state.set_aside)]
        while len(state.letters) > LETTERS_KEPT:
            del state.letters[state.oldest_letter(state.letters)]
        return True

    async def drop_dead_letter(self, job: str, super_batch_id: str) -> bool:
        """See the port."""
        state = self._jobs.get(job)
        if state is None or super_batch_id not in state.letters:
            return False
        state.set_aside.pop(super_batch_id, None)
        del state.letters[super_batch_id]
        return True

    async def requeue(
        self,
        job: str,
        super_batch_id: str,
        reference: ReferenceInfo | None,
        *,
        limits: Limits,
        ttl_s: float,
        now_s: float,
    ) -> RequeueStatus:
        """See the port."""
        state = self._jobs.get(job)
        if state is None or super_batch_id not in state.letters:
            return RequeueStatus.NO_LETTER
        if super_batch_id not in state.set_aside:
            return RequeueStatus.FORGOTTEN
        full = limits.whose_is_reached(self._held_by(job, lambda _: 1), more=1)
        if full is not None:
            return RequeueStatus(full)
        before = state.set_aside.pop(super_batch_id)
        del state.letters[super_batch_id]
        held = _InFlight(reference, before.world_size, before.step, now_s, now_s + ttl_s)
        held.submissions = {
            rank: submission.model_copy(update={"reference": reference})
            for rank, submission in before.submissions.items()
        }
        state.in_flight[super_batch_id] = held
        state.add(dead_lettered=-1, in_flight=1)
        return RequeueStatus.REQUEUED

    async def dead_letter_overdue(self, *, now_s: float) -> list[DeadLetter]:
        """See the port."""
        letters = [
            DeadLetter.expired(job, super_batch_id, at_s=now_s)
            for job, state in self._jobs.items()
            for super_batch_id, held in state.in_flight.items()
            if held.deadline_s <= now_s
        ]
        return [letter for letter in letters if await self.dead_letter(letter)]

    async def dead_letter_unserved(self, *, grace_s: float, now_s: float) -> list[DeadLetter]:
        """See the port."""
        letters = []
        for queued in list(self._queue.values()):
            model, version = queued.version
            current = [k.info.version for k in self._references.values() if k.info.name == model and self._served(k)]
            own = self._references.get(queued.version)
            if current and (own is None or own.until + grace_s <= time.monotonic()):
                job, super_batch_id = queued.shard.job, queued.shard.super_batch_id
                letters.append(
                    DeadLetter.unserved(job, super_batch_id, model=model, version=version, current=current, at_s=now_s)
                )
        return [letter for letter in letters if await self.dead_letter(letter)]

    # The queue

    async def claim(self, consumer: str, reference: ReferenceInfo, *, count: int, block_s: float) -> list[Claim]:
        """See the port."""
        line = self._line((reference.name, reference.version))
        try:
            async with asyncio.timeout(block_s):
                while (first := line.take_first(self._weight_of)) is None:
                    await self._queued.wait()
        except TimeoutError:
            return []
        claims = [self._take(first[2], consumer)]
        while len(claims) < count and (place := line.take_first(self._weight_of)) is not None:
            claims.append(self._take(place[2], consumer))
        return claims

    async def reclaim(self, consumer: str, reference: ReferenceInfo, *, idle_s: float, count: int) -> list[Claim]:
        """See the port."""
        idle_since = time.monotonic() - idle_s
        version = (reference.name, reference.version)
        idle = [
            (queued.turn, token)
            for token, queued in self._queue.items()
            if queued.consumer is not None and queued.version == version and queued.touched_at <= idle_since
        ]
        return [self._take(token, consumer) for _, token in sorted(idle)[:count]]

    async def keep(self, consumer: str, claims: Sequence[Claim]) -> None:
        """See the port."""
        for _, queued in self._owned(consumer, claims):
            queued.touched_at = time.monotonic()

    async def complete(self, claim: Claim, result: ShardResult) -> None:
        """See the port."""
        shard = claim.shard
        held = self._held(shard.job, shard.super_batch_id)
        token = None if held is None else held.tokens.pop(shard.shard_id, None)
        if held is None or token is None:
            return
        self._dequeue(token)
        held.results[shard.shard_id] = result
        self._tell(shard.job, shard.super_batch_id)

    async def release(self, consumer: str, claims: Sequence[Claim]) -> None:
        """See the port."""
        for _, queued in self._owned(consumer, claims):
            queued.consumer = None
            queued.deliveries -= 1
            self._wait(queued)

    async def memory(self) -> MemoryUse:
        """See the port; of features and results alone."""
        held = (super_batch for job in self._jobs.values() for super_batch in job.in_flight.values())
        results = sum(len(result.embeddings) for each in held for result in each.results.values())
        features = sum(len(queued.shard.features) for queued in self._queue.values())
        return MemoryUse(used_bytes=features + results, max_bytes=0)

    async def queue_depth(self) -> int:
        """See the port."""
        return len(self._queue)

    async def oldest_queued_age_s(self, *, now_s: float) -> float:
        """See the port."""
        oldest = min((queued.queued_at_s for queued in self._queue.values()), default=now_s)
        return max(0.0, now_s - oldest)

    async def news(self) -> AsyncIterator[News]:
        """See the port."""
        mailbox: asyncio.Queue[News] = asyncio.Queue(NEWS_KEPT)
        self._listeners.add(mailbox)
        try:
            while True:
                yield await mailbox.get()
        finally:
            self._listeners.discard(mailbox)

    def _held(self, job: str, super_batch_id: str) -> _InFlight | None:
        state = self._jobs.get(job)
        return None if state is None else state.in_flight.get(super_batch_id)

    def _held_by(self, job: str, amount: Callable[[_InFlight], int]) -> Limits:
        """Sums an amount over the super-batches in flight of a job, of its tenant, and of all."""
        tenant = prefix_of(job)
        sums = {name: sum(amount(held) for held in state.in_flight.values()) for name, state in self._jobs.items()}
        theirs = sum(held for name, held in sums.items() if tenant and name.startswith(tenant))
        return Limits(job=sums.get(job, 0), tenant=theirs, server=sum(sums.values()))

    def _served(self, known: _Announced) -> bool:
        return time.monotonic() < known.until

    def _weight_of(self, job: str) -> float:
        return self._jobs[job].job.spec.weight

    def _line(self, version: _VersionName) -> Line:
        return self._lines.setdefault(version, Line())

    def _enqueue(self, held: _InFlight, shard: Shard) -> None:
        self._tokens += 1
        held.tokens[shard.shard_id] = token = str(self._tokens)
        place = (held.deadline_s, f"{shard.super_batch_id}/{shard.shard_id}", token)
        self._queue[token] = queued = _Queued(shard, time.time(), place)
        self._wait(queued)

    def _wait(self, queued: _Queued) -> None:
        self._line(queued.version).put(queued.shard.job, queued.place)
        self._queued.set()  # wakes who waits now ...
        self._queued.clear()  # ... and nobody later

    def _dequeue(self, token: str) -> None:
        queued = self._queue.pop(token)
        if queued.consumer is None:
            self._line(queued.version).take_out(queued.shard.job, queued.place)

    def _take(self, token: str, consumer: str) -> Claim:
        queued = self._queue[token]
        if queued.consumer is None:
            self._turns += 1
            queued.turn = self._turns
        queued.consumer, queued.touched_at = consumer, time.monotonic()
        queued.deliveries += 1
        return Claim(queued.shard, token, queued.deliveries, queued.queued_at_s)

    def _owned(self, consumer: str, claims: Sequence[Claim]) -> list[tuple[str, _Queued]]:
        held = ((claim.token, self._queue.get(claim.token)) for claim in claims)
        return [(token, queued) for token, queued in held if queued is not None and queued.consumer == consumer]

    def _let_go(self, state: _JobState, super_batch_id: str) -> None:
        for token in state.in_flight.pop(super_batch_id).tokens.values():
            self._dequeue(token)
        self._tell(state.job.spec.name, super_batch_id)

    def _tell(self, job: str, super_batch_id: str) -> None:
        for mailbox in self._listeners:
            if mailbox.full():
                mailbox.get_nowait()
            mailbox.put_nowait(News(job, super_batch_id))
