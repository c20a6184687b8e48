"""The use case of taking super-batches in: keys first, then the features that the reference cache lacks."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jest_proto.tensors import content_digest
from jest_server.domain.errors import Conflict, DeadLettered, InvalidField, SuperBatchUnknown
from jest_server.domain.sources import AllowedSources
from jest_server.domain.super_batches import SubmitStatus, UploadStatus
from jest_server.selector.intake.quotas import Bounds
from jest_server.selector.intake.request import check_rank, submission_of
from jest_server.selector.intake.sources import check_sources, shards_of_sources
from jest_server.selector.intake.uploads import check_upload, shards_of_upload

if TYPE_CHECKING:
    from jest_server.domain.jobs import JobSpec
    from jest_server.domain.ports import DecisionLog, EmbeddingCache, SuperBatchStore
    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.super_batches import Submission, SubmitResult, SuperBatchRef
    from jest_server.runtime.settings import SelectorSettings
    from jest_server.selector.intake.request import Rows
    from jest_server.selector.intake.uploads import Upload
    from jest_server.use_cases.jobs import Jobs

_FULL = {
    *(SubmitStatus.JOB_FULL, SubmitStatus.TENANT_FULL, SubmitStatus.SERVER_FULL),
    *(UploadStatus.JOB_FULL, UploadStatus.TENANT_FULL, UploadStatus.SERVER_FULL),
}
_THREAD_FROM_KEYS = 4096


@dataclass(frozen=True)
class Accepted:
    """The answer to a submission; ``reference`` is None for a job without one."""

    missing: tuple[int, ...]
    reference: ReferenceInfo | None
    decided: bool


class Submissions:
    """Registers rows, tells what is lacking, and queues what is uploaded."""

    def __init__(
        self,
        super_batches: SuperBatchStore,
        decisions: DecisionLog,
        cache: EmbeddingCache,
        jobs: Jobs,
        settings: SelectorSettings,
    ) -> None:
        self._super_batches = super_batches
        self._decisions = decisions
        self._cache = cache
        self._jobs = jobs
        self._settings = settings
        self._bounds = Bounds(super_batches, settings)
        self._allowed = AllowedSources(settings.source_prefixes)

    async def submit(self, rows: Rows) -> Accepted:
        """Registers one rank's rows and tells which of them have to be uploaded.

        Raises:
            InvalidField: If a value cannot be, or fewer rows may be chosen than the sub-batch needs.
            JobUnknown, ReferenceUnavailable, QueueFull, Conflict, DeadLettered: As their names say.
        """
        spec = (await self._jobs.get(rows.job)).spec
        check_rank(rows.rank, rows.world_size, spec)
        if not 1 <= len(rows.keys) <= self._settings.max_rows_per_rank:
            raise InvalidField(
                f"example_keys holds {len(rows.keys)} keys, expected 1 to {self._settings.max_rows_per_rank}",
                field_name="example_keys",
            )
        # Many keys take a while to look at, and other calls want their answers meanwhile.
        reference = await self._jobs.reference(spec)
        if len(rows.keys) < _THREAD_FROM_KEYS:
            submission = self._checked(rows, spec, reference)
        else:
            submission = await asyncio.to_thread(self._checked, rows, spec, reference)
        result = await self._super_batches.submit(
            submission, limits=self._bounds.super_batches(spec), ttl_s=spec.super_batch_ttl_s, now_s=time.time()
        )
        if result.status is SubmitStatus.DECIDED:
            return await self._decided(submission)
        self._refuse(result, submission, spec, rows.context())
        missing = await self._missing(submission, result) if spec.policy.needs_reference_model else ()
        named = tuple(row for row in missing if rows.sources and rows.sources[row])
        if named:
            assert result.reference is not None, "a job that needs the reference model has one"
            await self._queue_named(rows, named, result.reference)
            missing = tuple(row for row in missing if not rows.sources[row])
        return Accepted(missing, result.reference, decided=False)

    async def require_room(self, job: str, nbytes: int, context: dict[str, str]) -> None:
        """Refuses features before they are received that would be refused afterwards; see ``Bounds``."""
        await self._bounds.require_room(job, nbytes, context)

    async def upload(self, upload: Upload) -> int:
        """Queues the features for scoring and returns how many examples were taken; all of them or none.

        Raises:
            InvalidField: If positions, names, datatypes or shapes are not what the reference model needs.
            SuperBatchUnknown: If the rank did not submit this super-batch, or it is forgotten.
            Conflict: If some of the rows were uploaded before with other content.
            QueueFull: If features of as many bytes as there may be wait for scorers.
            DeadLettered: If the super-batch was set aside.
        """
        context = upload.context()
        digest = content_digest(upload.specs, upload.positions)
        super_batch = await self._super_batches.get_super_batch(upload.ref)
        submission = super_batch.submissions.get(upload.rank) if super_batch else None
        if super_batch is None or submission is None:
            return await self._upload_without_super_batch(upload)
        if super_batch.reference is None:
            raise InvalidField(
                f"job {upload.job!r} has no reference model: expected no uploads", context, field_name="job"
            )
        check_upload(upload, len(submission.keys), super_batch.reference)
        earlier = super_batch.uploads.get(upload.rank, {})
        clash = {p for d, positions in earlier.items() if d != digest for p in positions} & set(upload.positions)
        if clash:
            raise Conflict(f"positions {sorted(clash)[:5]} were uploaded before with other content", context)
        status = await self._super_batches.add_upload(
            upload.ref,
            upload.rank,
            digest=digest,
            positions=upload.positions,
            limits=self._bounds.features,
            shards=await asyncio.to_thread(
                shards_of_upload,
                upload,
                submission.keys,
                super_batch.reference,
                digest,
                shard_examples=self._settings.shard_examples,
            ),
        )
        if status is UploadStatus.GONE:
            return await self._upload_without_super_batch(upload)
        if status in _FULL:
            raise self._bounds.features_full(status.value, upload.job, context)
        return len(upload.positions)

    def _refuse(self, result: SubmitResult, submission: Submission, spec: JobSpec, context: dict[str, str]) -> None:
        status = result.status
        if status is SubmitStatus.CONFLICT:
            if result.step != submission.step:
                raise Conflict(
                    f"rank {submission.rank} submits super-batch {submission.super_batch_id!r} of job "
                    f"{submission.job!r} with {_step(submission.step)}, it was submitted with "
                    f"{_step(result.step)} before; the step has to be the same on all ranks",
                    context,
                )
            raise Conflict(
                f"rank {submission.rank} submitted super-batch {submission.super_batch_id!r} of job "
                f"{submission.job!r} before with other keys, other group labels or another world size; every "
                "super-batch needs its own id",
                context,
            )
        if status in _FULL:
            raise self._bounds.super_batches_full(status.value, spec, context)
        if status is SubmitStatus.DEAD:
            raise DeadLettered(f"super-batch {submission.super_batch_id!r} was set aside", context)

    async def _decided(self, submission: Submission) -> Accepted:
        decision = await self._decisions.get_decision(submission.ref)
        context = submission.ref.metadata | {"rank": str(submission.rank)}
        if decision is None:
            raise SuperBatchUnknown(f"super-batch {submission.super_batch_id!r} is forgotten", context)
        if decision.submission_digests.get(submission.rank) != submission.digest:
            raise Conflict(
                f"super-batch {submission.super_batch_id!r} of job {submission.job!r} was decided with other keys, "
                "other group labels or another step",
                context,
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

    def _checked(self, rows: Rows, spec: JobSpec, reference: ReferenceInfo | None) -> Submission:
        check_sources(rows, self._allowed)
        return submission_of(rows, spec, reference)

    async def _queue_named(self, rows: Rows, positions: tuple[int, ...], reference: ReferenceInfo) -> None:
        digest, shards = shards_of_sources(rows, positions, reference, shard_examples=self._settings.shard_examples)
        status = await self._super_batches.add_upload(
            rows.ref,
            rows.rank,
            digest=digest,
            positions=positions,
            shards=shards,
            limits=self._bounds.features,
        )
        if status in _FULL:
            raise self._bounds.features_full(status.value, rows.job, rows.context())

    async def _upload_without_super_batch(self, upload: Upload) -> int:
        if await self._decisions.get_decision(upload.ref):
            return len(upload.positions)
        await self._jobs.get(upload.job)
        raise await gone(self._decisions, upload.ref, upload.rank)


def _step(step: int | None) -> str:
    return "no step" if step is None else f"step {step}"


async def gone(decisions: DecisionLog, ref: SuperBatchRef, rank: int) -> DeadLettered | SuperBatchUnknown:
    """Return the error that says why a super-batch is not in flight."""
    context = ref.metadata | {"rank": str(rank)}
    letter = await decisions.get_dead_letter(ref)
    if letter is not None:
        return DeadLettered(f"{ref} was set aside: {letter.reason}: {letter.detail}", context)
    return SuperBatchUnknown(f"rank {rank} did not submit {ref}; submit it first", context)
