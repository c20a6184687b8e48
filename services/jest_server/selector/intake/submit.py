"""Takes a rank's rows of a super-batch: registers them, and returns those whose features have to be uploaded."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jest_server.domain.errors import Conflict, DeadLettered, InvalidField, SuperBatchUnknown
from jest_server.domain.policies import policy_of
from jest_server.domain.sources import AllowedSources
from jest_server.domain.super_batches import SubmitStatus
from jest_server.selector.intake.request import check_rank, check_submission
from jest_server.selector.intake.sources import check_sources, shards_of_sources

if TYPE_CHECKING:
    from jest_server.domain.jobs import JobSpec
    from jest_server.domain.ports import DecisionLog, EmbeddingCache, SuperBatchStore
    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.super_batches import Submission, SubmitResult
    from jest_server.runtime.settings import SelectorSettings
    from jest_server.selector.intake.quotas import Quotas
    from jest_server.use_cases.jobs import JobRegistry

_THREAD_FROM_KEYS = 4096


@dataclass(frozen=True)
class Accepted:
    """The answer to a submission; `reference` is None for a job without one."""

    missing: tuple[int, ...]
    reference: ReferenceInfo | None
    decided: bool


class SubmitSuperBatch:
    """Registers rows, and finds those whose reference embeddings are missing."""

    def __init__(
        self,
        super_batches: SuperBatchStore,
        decisions: DecisionLog,
        cache: EmbeddingCache,
        jobs: JobRegistry,
        quotas: Quotas,
        settings: SelectorSettings,
    ) -> None:
        self._super_batches = super_batches
        self._decisions = decisions
        self._cache = cache
        self._jobs = jobs
        self._quotas = quotas
        self._settings = settings
        self._allowed = AllowedSources(settings.source_prefixes)

    async def run(self, submission: Submission) -> Accepted:
        """Register one rank's rows and return which of them have to be uploaded.

        Raises:
            InvalidField: If a value is invalid, or fewer rows may be selected than the sub-batch needs.
            JobUnknown, ReferenceUnavailable: If the job or its reference model is not there.
            QueueFull: If as many super-batches are in flight, or as many features wait, as there may be.
            Conflict: If the super-batch was submitted before with other content.
            DeadLettered: If it was dead-lettered.
        """
        spec = (await self._jobs.get(submission.job)).spec
        submission = await self._checked(submission, spec)
        result = await self._super_batches.submit(
            submission, limits=self._quotas.super_batches(spec), ttl_s=spec.super_batch_ttl_s, now_s=time.time()
        )
        if result.status is SubmitStatus.DECIDED:
            return await self._decided(submission)
        self._refuse(result, submission, spec)
        reference = result.reference
        missing = await self._missing(submission, result) if policy_of(spec.policy).needs_reference_model else ()
        named = tuple(row for row in missing if submission.sources and submission.sources[row])
        if named:
            assert reference is not None, "a job that needs the reference model has one"
            await self._queue_sources(submission, named, reference)
            missing = tuple(row for row in missing if not submission.sources[row])
        return Accepted(missing, reference, decided=False)

    async def _checked(self, submission: Submission, spec: JobSpec) -> Submission:
        check_rank(submission.rank, submission.world_size, spec)
        rows, most = len(submission.keys), self._settings.max_rows_per_rank
        if not 1 <= rows <= most:
            raise InvalidField(f"example_keys holds {rows} keys, expected 1 to {most}", field_name="example_keys")
        reference = await self._jobs.reference(spec)

        def check() -> Submission:
            check_sources(submission, self._allowed)
            return check_submission(submission, spec, reference)

        return check() if rows < _THREAD_FROM_KEYS else await asyncio.to_thread(check)

    def _refuse(self, result: SubmitResult, submission: Submission, spec: JobSpec) -> None:
        if result.status is SubmitStatus.CONFLICT:
            if result.step != submission.step:
                raise Conflict(
                    f"rank {submission.rank} submits {submission.ref} with step {submission.step}, it was submitted "
                    f"with step {result.step} before; the step has to be the same on all ranks",
                    submission.metadata,
                )
            raise Conflict(
                f"rank {submission.rank} submitted {submission.ref} before with other keys, other group labels or "
                "another world size; every super-batch needs its own id",
                submission.metadata,
            )
        self._quotas.require_in_flight(result.status, spec, submission.metadata)
        if result.status is SubmitStatus.DEAD:
            raise DeadLettered(f"super-batch {submission.super_batch_id!r} was dead-lettered", submission.metadata)

    async def _decided(self, submission: Submission) -> Accepted:
        decision = await self._decisions.get_decision(submission.ref)
        if decision is None:
            raise SuperBatchUnknown(f"super-batch {submission.super_batch_id!r} is forgotten", submission.metadata)
        if decision.submission_digests.get(submission.rank) != submission.digest:
            raise Conflict(
                f"{submission.ref} was decided with other keys, other group labels or another step",
                submission.metadata,
            )
        return Accepted((), submission.reference, decided=True)

    async def _missing(self, submission: Submission, result: SubmitResult) -> tuple[int, ...]:
        """Return the first row of each key that is neither cached nor uploaded."""
        assert result.reference is not None, "a job that needs the reference model has one"
        known = {submission.keys[position] for position in result.uploaded}
        first_rows: dict[str, int] = {}
        for row, key in enumerate(submission.keys):
            if key not in known:
                first_rows.setdefault(key, row)
        cached = await self._cache.for_tenant_of(submission.job).get(result.reference, list(first_rows))
        return tuple(row for row, value in zip(first_rows.values(), cached, strict=True) if value is None)

    async def _queue_sources(
        self, submission: Submission, positions: tuple[int, ...], reference: ReferenceInfo
    ) -> None:
        digest, shards = shards_of_sources(
            submission, positions, reference, shard_examples=self._settings.shard_examples
        )
        status = await self._super_batches.add_upload(
            submission.ref,
            submission.rank,
            digest=digest,
            positions=positions,
            shards=shards,
            limits=self._quotas.features,
        )
        self._quotas.require_accepted(status, submission.job, submission.metadata)
