"""How a decision comes about: wait for the ranks, wait for the reference, choose, record."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from jest_core import selection_seed
from jest_proto import tracing
from jest_server.domain.dead_letters import DeadLetter
from jest_server.domain.decisions import Decision
from jest_server.domain.errors import DeadLettered, ReferenceTimeout, SuperBatchUnknown
from jest_server.runtime.logs import get_logger
from jest_server.selector.decide.choose import Chosen, Inputs, Question, choose, rule
from jest_server.selector.decide.join_reference import Joined, join_reference
from jest_server.selector.intake.submit import gone
from jest_server.selector.learner_outputs.pending import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import torch

    from jest_server.domain.decisions import Retention
    from jest_server.domain.jobs import Job
    from jest_server.domain.ports import DecisionLog, EmbeddingCache, SuperBatchStore
    from jest_server.domain.super_batches import SuperBatch, SuperBatchRef
    from jest_server.runtime.metrics import SelectorMetrics
    from jest_server.selector.learner_outputs.pending import Assembly
    from jest_server.use_cases.jobs import Jobs

POLL_S = 1.0
"""How long a wait for news lasts before the store is asked; only lost news make it matter."""
RETRY_S = 0.5

T = TypeVar("T")
_log = get_logger()


class Scheduler(Protocol):
    """Decides which of the selections that wait is computed next."""

    async def run(self, job: str, cost: float, work: Callable[[], T]) -> T:
        """Runs the work in a thread when it is the job's turn; ``cost`` is relative."""


class Decider:
    """Makes decisions from what assemblies gather."""

    def __init__(
        self,
        super_batches: SuperBatchStore,
        decisions: DecisionLog,
        cache: EmbeddingCache,
        jobs: Jobs,
        scheduler: Scheduler,
        metrics: SelectorMetrics,
        *,
        device: torch.device,
        keep: Retention,
    ) -> None:
        self._super_batches = super_batches
        self._decisions = decisions
        self._cache = cache
        self._jobs = jobs
        self._scheduler = scheduler
        self._metrics = metrics
        self._device = device
        self._keep = keep
        self._waiting: defaultdict[SuperBatchRef, set[asyncio.Event]] = defaultdict(set)

    async def listen(self) -> None:
        """Wake waiting selections at each event of their super-batch, without end."""
        async for event in self._super_batches.events():
            for wakeup in self._waiting.get(event.ref, ()):
                wakeup.set()

    async def decide(self, assembly: Assembly) -> Outcome:
        """Decides, once all ranks' outputs and the reference embeddings are there, and records it.

        Raises:
            ReferenceTimeout, ReferenceMissing, DeadLettered, SuperBatchUnknown: As their names say.
        """
        try:
            return await self._decide_in_flight(assembly)
        except SuperBatchUnknown:
            # Another selector may have decided since this call began.
            decision = await self._decisions.get_decision(assembly.ref)
            if decision is None:
                raise
            return Outcome(decision, None)

    async def _decide_in_flight(self, assembly: Assembly) -> Outcome:
        with _stage("selector.wait_learner", assembly):
            await self._until_complete(assembly)
        learner_at = time.monotonic()
        assembly.stage = "WAITING_FOR_REFERENCE"
        job = await self._jobs.get(assembly.job)
        with _stage("selector.wait_reference", assembly):
            super_batch, joined, fallback_reason = await self._await_reference(assembly, job)
        reference_at = time.monotonic()
        assembly.stage = "COMPUTING"
        with _stage("selector.compute", assembly):
            decision, learnability = await self._compute(assembly, job, super_batch, joined, fallback_reason)
        timings = {
            "wait_learner": learner_at - assembly.started_at,
            "wait_reference": reference_at - learner_at,
            **decision.timings_s,
        }
        record_at = time.monotonic()
        decision = decision.model_copy(update={"timings_s": timings})
        with _stage("selector.record", assembly):
            recorded = await self._decisions.decide(decision, keep_s=self._keep.seconds, keep_count=self._keep.count)
        if recorded == decision:
            self._observe(recorded, learnability, record_s=time.monotonic() - record_at)
        rows = tuple(len(super_batch.submissions[rank].keys) for rank in range(assembly.world_size))
        return Outcome(recorded, joined.embeddings if joined else None, rows)

    async def _until_complete(self, assembly: Assembly) -> None:
        while not assembly.complete.is_set():
            try:
                async with asyncio.timeout(POLL_S * 5):
                    await assembly.complete.wait()
            except TimeoutError:
                if await self._super_batches.get_super_batch(assembly.ref) is None:
                    raise await gone(self._decisions, assembly.ref, 0) from None

    async def _await_reference(self, assembly: Assembly, job: Job) -> tuple[SuperBatch, Joined | None, str]:
        """Returns the super-batch with its reference embeddings, or with the reason for the fallback."""
        ref = assembly.ref
        give_up_at = time.monotonic() + job.spec.reference_timeout_s
        news = asyncio.Event()
        self._waiting[ref].add(news)
        try:
            while True:
                news.clear()
                super_batch = await self._super_batches.get_super_batch(ref)
                if super_batch is None:
                    raise await gone(self._decisions, ref, 0)
                if not job.spec.policy.needs_reference_model:
                    return super_batch, None, ""
                if super_batch.pending_shards == 0:
                    return super_batch, await join_reference(self._super_batches, self._cache, super_batch), ""
                left = give_up_at - time.monotonic()
                if left <= 0:
                    return super_batch, None, self._timeout_reason(job, super_batch)
                await _wait(news, min(left, POLL_S))
        finally:
            self._waiting[ref].discard(news)
            if not self._waiting[ref]:
                del self._waiting[ref]

    def _timeout_reason(self, job: Job, super_batch: SuperBatch) -> str:
        reason = (
            f"{super_batch.pending_shards} shards of super-batch {super_batch.super_batch_id!r} were not scored within "
            f"reference_timeout ({job.spec.reference_timeout_s:g} s)"
        )
        if job.spec.fallback == "fail":
            raise ReferenceTimeout(
                f"{reason}; job {job.spec.name!r} has no fallback",
                {"job": job.spec.name, "super_batch_id": super_batch.super_batch_id},
                retry_after_s=RETRY_S,
            )
        return reason

    async def _compute(
        self, assembly: Assembly, job: Job, super_batch: SuperBatch, joined: Joined | None, fallback_reason: str
    ) -> tuple[Decision, tuple[float, float] | None]:
        """Returns the decision to record, and the learnability of chosen and dropped rows (see ``Chosen``)."""
        inputs = Inputs(
            super_batch.submissions,
            assembly.outputs,
            None if joined is None or super_batch.reference is None else (super_batch.reference, joined.embeddings),
        )
        fallback = job.spec.fallback if fallback_reason else None
        seed = selection_seed(job.spec.seed, assembly.super_batch_id)
        question = Question(rule(job.spec.policy, fallback), seed, super_batch.step, inputs)
        queued_at = time.monotonic()
        started_at = queued_at

        def work() -> Chosen:
            nonlocal started_at
            started_at = time.monotonic()
            return choose(question, self._device)

        try:
            chosen = await self._scheduler.run(assembly.job, question.cost(), work)
        except ValueError as error:
            raise await self._set_aside(assembly, str(error)) from error
        decision = Decision(
            job=assembly.job,
            super_batch_id=assembly.super_batch_id,
            policy=job.spec.policy,
            seed=seed,
            reference=super_batch.reference,
            learner_digests={rank: outputs.digest for rank, outputs in assembly.outputs.items()},
            submission_digests={rank: submission.digest for rank, submission in super_batch.submissions.items()},
            positions=chosen.positions,
            weights=chosen.weights,
            step=super_batch.step,
            gain=chosen.gain,
            sub_batch_size=chosen.sub_batch_size,
            super_batch_size=sum(inputs.rows),
            perplexity=chosen.perplexity,
            cache_hits=joined.cache_hits if joined else 0,
            reference_inferences=joined.inferences if joined else 0,
            fallback=fallback,
            fallback_reason=fallback_reason,
            timings_s={"queue": started_at - queued_at, "compute": time.monotonic() - started_at},
            decided_at_s=time.time(),
        )
        return decision, chosen.learnability

    async def _set_aside(self, assembly: Assembly, detail: str) -> DeadLettered:
        letter = DeadLetter.of(assembly.ref, reason="UNSELECTABLE", detail=detail, at_s=time.time())
        if await self._decisions.dead_letter(letter):
            self._metrics.dead_lettered(letter)
        return DeadLettered(f"{assembly.ref} was set aside: {detail}", assembly.ref.metadata)

    def _observe(self, decision: Decision, learnability: tuple[float, float] | None, *, record_s: float) -> None:
        self._metrics.decided(decision, {**decision.timings_s, "record": record_s}, learnability)
        if decision.fallback:
            _log.warning("fallback used", fallback=decision.fallback, reason=decision.fallback_reason)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return


def _stage(name: str, assembly: Assembly) -> AbstractContextManager[Any]:
    """Records a stage of what all ranks wait for."""
    return tracing.span(name, job=assembly.job, super_batch_id=assembly.super_batch_id)
