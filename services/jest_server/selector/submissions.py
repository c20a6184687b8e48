"""The use case of taking super-batches in: keys first, then the features that the reference cache lacks."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jest_proto import tracing
from jest_proto.tensors import as_numpy, content_digest
from jest_server import records
from jest_server.errors import Conflict, DeadLettered, InvalidField, SuperBatchUnknown
from jest_server.jobs import policy_of
from jest_server.model import MAX_KEY_BYTES, Shard, Submission, SubmitStatus, UploadStatus
from jest_server.selector.bounds import Bounds
from jest_server.selector.named import check_sources, shards_of_sources
from jest_server.sources import AllowedSources

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jest_proto.tensors import Bytes
    from jest_proto.v1 import tensors_pb2
    from jest_server.jobs import Jobs
    from jest_server.model import JobSpec, ReferenceInfo, SuperBatch
    from jest_server.ports import EmbeddingCache, SuperBatchStore
    from jest_server.settings import SelectorSettings

_FULL = {
    *(SubmitStatus.JOB_FULL, SubmitStatus.TENANT_FULL, SubmitStatus.SERVER_FULL),
    *(UploadStatus.JOB_FULL, UploadStatus.TENANT_FULL, UploadStatus.SERVER_FULL),
}
_MAX_LABEL_BYTES = 256
_THREAD_FROM_KEYS = 4096


@dataclass(frozen=True)
class Rows:
    """One rank's rows of a super-batch as it submits them; see the contract for what is optional."""

    job: str
    super_batch_id: str
    rank: int
    world_size: int
    keys: tuple[str, ...]
    step: int | None = None
    group_labels: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def context(self) -> dict[str, str]:
        """Returns the ids for errors."""
        return {"job": self.job, "super_batch_id": self.super_batch_id, "rank": str(self.rank)}

    def digest(self) -> str:
        """Names the content."""
        sources = (self.sources,) if self.sources else ()
        return content_digest((), self.world_size, self.keys, self.step, self.group_labels, *sources)


@dataclass(frozen=True)
class Accepted:
    """The answer to a submission; ``reference`` is None for a job without one."""

    missing: tuple[int, ...]
    reference: ReferenceInfo | None
    decided: bool


@dataclass(frozen=True)
class Upload:
    """The features of some of a rank's rows, complete and checked against their checksums."""

    job: str
    super_batch_id: str
    rank: int
    positions: tuple[int, ...]
    specs: Sequence[tensors_pb2.TensorSpec]
    buffers: Sequence[Bytes]

    def context(self) -> dict[str, str]:
        """Returns the ids for errors."""
        return {"job": self.job, "super_batch_id": self.super_batch_id, "rank": str(self.rank)}


class Submissions:
    """Registers rows, tells what is lacking, and queues what is uploaded."""

    def __init__(self, store: SuperBatchStore, cache: EmbeddingCache, jobs: Jobs, settings: SelectorSettings) -> None:
        self._store = store
        self._cache = cache
        self._jobs = jobs
        self._settings = settings
        self._bounds = Bounds(store, settings)
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
        status = await self._store.submit(
            submission, limits=self._bounds.super_batches(spec), ttl_s=spec.super_batch_ttl_s, now_s=time.time()
        )
        if status is SubmitStatus.DECIDED:
            return await self._decided(submission)
        super_batch = await self._store.get_super_batch(rows.job, rows.super_batch_id)
        self._refuse(status, submission, super_batch, spec, rows.context())
        if super_batch is None:
            return await self._decided(submission)
        missing = await self._missing(submission, super_batch) if spec.policy.needs_reference_model else ()
        named = tuple(row for row in missing if rows.sources and rows.sources[row])
        if named:
            assert super_batch.reference is not None, "a job that needs the reference model has one"
            await self._queue_named(rows, named, super_batch.reference)
            missing = tuple(row for row in missing if not rows.sources[row])
        return Accepted(missing, super_batch.reference, decided=False)

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
        super_batch = await self._store.get_super_batch(upload.job, upload.super_batch_id)
        submission = super_batch.submissions.get(upload.rank) if super_batch else None
        if super_batch is None or submission is None:
            return await self._upload_without_super_batch(upload)
        if super_batch.reference is None:
            raise InvalidField(
                f"job {upload.job!r} has no reference model: expected no uploads", context, field_name="job"
            )
        self._check_upload(upload, len(submission.keys), super_batch.reference)
        earlier = super_batch.uploads.get(upload.rank, {})
        clash = {p for d, positions in earlier.items() if d != digest for p in positions} & set(upload.positions)
        if clash:
            raise Conflict(f"positions {sorted(clash)[:5]} were uploaded before with other content", context)
        status = await self._store.add_upload(
            upload.job,
            upload.super_batch_id,
            upload.rank,
            digest=digest,
            positions=upload.positions,
            limits=self._bounds.features,
            shards=await asyncio.to_thread(self._shards, upload, submission, super_batch.reference, digest),
        )
        if status is UploadStatus.GONE:
            return await self._upload_without_super_batch(upload)
        if status in _FULL:
            raise self._bounds.features_full(status.value, upload.job, context)
        return len(upload.positions)

    def _refuse(
        self,
        status: SubmitStatus,
        submission: Submission,
        super_batch: SuperBatch | None,
        spec: JobSpec,
        context: dict[str, str],
    ) -> None:
        if status is SubmitStatus.CONFLICT:
            if super_batch is not None and super_batch.step != submission.step:
                raise Conflict(
                    f"rank {submission.rank} submits super-batch {submission.super_batch_id!r} of job "
                    f"{submission.job!r} with {_step(submission.step)}, it was submitted with "
                    f"{_step(super_batch.step)} before; the step has to be the same on all ranks",
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
        decision = await self._store.get_decision(submission.job, submission.super_batch_id)
        context = {"job": submission.job, "super_batch_id": submission.super_batch_id, "rank": str(submission.rank)}
        if decision is None:
            raise SuperBatchUnknown(f"super-batch {submission.super_batch_id!r} is forgotten", context)
        if decision.submission_digests.get(submission.rank) != submission.digest:
            raise Conflict(
                f"super-batch {submission.super_batch_id!r} of job {submission.job!r} was decided with other keys, "
                "other group labels or another step",
                context,
            )
        return Accepted((), submission.reference, decided=True)

    async def _missing(self, submission: Submission, super_batch: SuperBatch) -> tuple[int, ...]:
        """Returns the first row of each key that is neither cached nor uploaded."""
        assert super_batch.reference is not None, "a job that needs the reference model has one"
        uploaded = super_batch.uploads.get(submission.rank, {})
        known = {submission.keys[p] for positions in uploaded.values() for p in positions}
        first_rows: dict[str, int] = {}
        for row, key in enumerate(submission.keys):
            if key not in known:
                first_rows.setdefault(key, row)
        cached = await self._cache.of_job(submission.job).get(super_batch.reference, list(first_rows))
        return tuple(row for row, value in zip(first_rows.values(), cached, strict=True) if value is None)

    def _checked(self, rows: Rows, spec: JobSpec, reference: ReferenceInfo | None) -> Submission:
        check_sources(rows, self._allowed)
        return _submission(rows, spec, reference)

    async def _queue_named(self, rows: Rows, positions: tuple[int, ...], reference: ReferenceInfo) -> None:
        digest, shards = shards_of_sources(rows, positions, reference, shard_examples=self._settings.shard_examples)
        status = await self._store.add_upload(
            rows.job,
            rows.super_batch_id,
            rows.rank,
            digest=digest,
            positions=positions,
            shards=shards,
            limits=self._bounds.features,
        )
        if status in _FULL:
            raise self._bounds.features_full(status.value, rows.job, rows.context())

    def _check_upload(self, upload: Upload, rows: int, reference: ReferenceInfo) -> None:
        positions = np.asarray(upload.positions, np.int64)
        if not positions.size or positions[-1] >= rows or (np.diff(positions) <= 0).any():
            raise InvalidField(
                f"positions {_shorten(upload.positions)} are not right: "
                f"expected one or more, ascending, without repeats, below {rows}",
                upload.context(),
                field_name="positions",
            )
        inputs = {i.name: i for i in reference.inputs}
        names = [spec.name for spec in upload.specs]
        if sorted(names) != sorted(inputs):
            raise InvalidField(
                f"tensors are {sorted(names)}, expected {sorted(inputs)}: the inputs of {reference.name!r}",
                upload.context(),
                field_name="tensors",
            )
        for spec in upload.specs:
            expected = inputs[spec.name]
            if spec.datatype != expected.datatype:
                raise InvalidField(
                    f"tensors[{spec.name}].datatype is {spec.datatype}, expected {expected.datatype}",
                    upload.context(),
                    field_name=f"tensors[{spec.name}].datatype",
                )
            wanted = (len(upload.positions), *expected.shape)
            if len(spec.shape) != len(wanted) or any(w not in (-1, s) for w, s in zip(wanted, spec.shape, strict=True)):
                raise InvalidField(
                    f"tensors[{spec.name}].shape is {list(spec.shape)}, expected {list(wanted)}",
                    upload.context(),
                    field_name=f"tensors[{spec.name}].shape",
                )

    def _shards(self, upload: Upload, submission: Submission, reference: ReferenceInfo, digest: str) -> list[Shard]:
        arrays = {
            spec.name: (spec, as_numpy(spec, data)) for spec, data in zip(upload.specs, upload.buffers, strict=True)
        }
        size = self._settings.shard_examples
        return [
            Shard(
                shard_id=f"{upload.rank}-{digest[:16]}-{start // size:06d}",
                job=upload.job,
                super_batch_id=upload.super_batch_id,
                reference_model=reference.name,
                reference_version=reference.version,
                keys=tuple(submission.keys[p] for p in upload.positions[start : start + size]),
                features=_pack({n: (s.datatype, a[start : start + size]) for n, (s, a) in arrays.items()}),
                traceparent=tracing.traceparent(),
            )
            for start in range(0, len(upload.positions), size)
        ]

    async def _upload_without_super_batch(self, upload: Upload) -> int:
        if await self._store.get_decision(upload.job, upload.super_batch_id):
            return len(upload.positions)
        await self._jobs.get(upload.job)
        raise await gone(self._store, upload.job, upload.super_batch_id, upload.rank)


def _submission(rows: Rows, spec: JobSpec, reference: ReferenceInfo | None) -> Submission:
    """Returns the rows as the store keeps them.

    Raises:
        InvalidField: If a value cannot be, or fewer rows may be chosen than the sub-batch needs.
    """
    _check_lengths("example_keys", rows.keys, least=1, most=MAX_KEY_BYTES)
    if rows.step is None and spec.policy.is_scheduled:
        raise InvalidField(
            f"step is not set, expected the training step: the policy of job {spec.name!r} has a schedule",
            field_name="step",
        )
    _check_labels(rows, spec)
    if spec.world_size == 1:  # otherwise only all ranks together know the super-batch
        _check_enough(rows, spec)
    return Submission(
        job=rows.job,
        super_batch_id=rows.super_batch_id,
        rank=rows.rank,
        world_size=rows.world_size,
        reference=reference,
        keys=rows.keys,
        digest=rows.digest(),
        step=rows.step,
        group_labels=rows.group_labels,
    )


def _check_labels(rows: Rows, spec: JobSpec) -> None:
    limit = spec.policy.max_per_group
    if not rows.group_labels and limit is None:
        return
    if len(rows.group_labels) != len(rows.keys):
        needed = "" if limit is None else f", because max_per_group of job {spec.name!r} is {limit}"
        raise InvalidField(
            f"group_labels holds {len(rows.group_labels)} labels, expected {len(rows.keys)}: one for each row{needed}",
            field_name="group_labels",
        )
    _check_lengths("group_labels", rows.group_labels, least=0, most=_MAX_LABEL_BYTES)


def _check_lengths(field: str, texts: Sequence[str], *, least: int, most: int) -> None:
    for row, text in enumerate(texts):
        size = len(text.encode())
        if not least <= size <= most:
            raise InvalidField(
                f"{field}[{row}] is {size} bytes long, expected {least} to {most}", field_name=f"{field}[{row}]"
            )


def _check_enough(rows: Rows, spec: JobSpec) -> None:
    """Refuses a super-batch of one rank from which no sub-batch can be chosen."""
    try:
        policy = policy_of(spec.policy)
        if rows.step is not None:
            policy = policy.at_step(rows.step, len(rows.keys))
        needed = policy.resolve_sub_batch_size(len(rows.keys))
    except ValueError as error:
        raise InvalidField(f"example_keys: {error}", field_name="example_keys") from error
    if len(set(rows.keys)) < needed:
        raise InvalidField(
            f"example_keys holds {len(set(rows.keys))} distinct keys, expected at least the sub-batch ({needed}): "
            "at most one of the rows with equal keys can be chosen",
            field_name="example_keys",
        )
    limit = spec.policy.max_per_group
    if limit is None:
        return
    counts = Counter(rows.group_labels)
    allowed = counts.pop("", 0) + sum(min(count, limit) for count in counts.values())
    if allowed < needed:
        raise InvalidField(
            f"group_labels allow {allowed} rows, expected at least the sub-batch ({needed}): max_per_group is {limit}",
            field_name="group_labels",
        )


def _step(step: int | None) -> str:
    return "no step" if step is None else f"step {step}"


def check_rank(rank: int, world_size: int, spec: JobSpec) -> None:
    """Refuses ranks that the job does not have.

    Raises:
        InvalidField: If ``world_size`` is not the job's or ``rank`` lies outside it.
    """
    if world_size != spec.world_size:
        raise InvalidField(
            f"world_size is {world_size}, job {spec.name!r} was created with {spec.world_size}", field_name="world_size"
        )
    if rank >= world_size:
        raise InvalidField(f"rank is {rank}, expected 0 to {world_size - 1}", field_name="rank")


async def gone(store: SuperBatchStore, job: str, super_batch_id: str, rank: int) -> DeadLettered | SuperBatchUnknown:
    """Returns the error that tells why a super-batch is not in flight."""
    context = {"job": job, "super_batch_id": super_batch_id, "rank": str(rank)}
    letter = await store.get_dead_letter(job, super_batch_id)
    if letter is not None:
        return DeadLettered(
            f"super-batch {super_batch_id!r} of job {job!r} was set aside: {letter.reason}: {letter.detail}", context
        )
    return SuperBatchUnknown(
        f"rank {rank} did not submit super-batch {super_batch_id!r} of job {job!r}; submit it first", context
    )


def _pack(arrays: dict[str, tuple[str, Any]]) -> bytes:
    description = {
        "tensors": [{"name": n, "datatype": datatype, "shape": a.shape} for n, (datatype, a) in arrays.items()]
    }
    return records.pack(
        description, *(np.ascontiguousarray(a).view(np.uint8).reshape(-1).data for _, a in arrays.values())
    )


def _shorten(positions: Sequence[int]) -> str:
    return str(list(positions)) if len(positions) <= 8 else f"[{', '.join(map(str, positions[:8]))}, …]"
