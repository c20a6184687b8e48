"""What the use cases need from the outside world; each port has an adapter, and an in-memory twin in the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from jest_server.domain.attempts import AttemptRequest, OpenResult
    from jest_server.domain.dead_letters import DeadLetter, RequeueStatus
    from jest_server.domain.decisions import Decision
    from jest_server.domain.jobs import Counters, Job, JobSpec
    from jest_server.domain.references import Announced, ReferenceInfo
    from jest_server.domain.shards import Claim, QueueState, Shard, ShardResult
    from jest_server.domain.storage import CacheStats, Lease, MemoryUse
    from jest_server.domain.super_batches import (
        Limits,
        Submission,
        SubmitResult,
        SuperBatch,
        SuperBatchEvent,
        SuperBatchRef,
        UploadStatus,
    )


class StoreConnection(Protocol):
    """The server behind the four stores of the queue. Nothing in it may be evicted.

    Whatever changes state is atomic, may be repeated, and keeps
    `submitted == selected + dead_lettered + in_flight` true at every moment, across the death of any caller.
    Every call to a store raises `StoreUnavailable` if the server does not answer.
    """

    async def ping(self) -> None:
        """Raise `StoreUnavailable` unless the server answers."""

    async def memory(self) -> MemoryUse:
        """Return how much memory the server uses, and may use."""

    async def close(self) -> None:
        """Close all connections."""


class JobStore(Protocol):
    """Keep jobs and their counters until they are deleted, and reference models while scorers announce them."""

    async def create_job(self, spec: JobSpec, *, now_s: float) -> tuple[Job, bool]:
        """Register the job unless the name is taken; return what is registered and whether this call did it."""

    async def get_job(self, name: str) -> Job | None: ...

    async def list_jobs(self, *, after: str, limit: int) -> list[Job]:
        """Return up to `limit` jobs whose names sort after `after`, in order of name."""

    async def delete_job(self, name: str) -> bool:
        """Delete the job, its super-batches, queued shards, dead letters and decisions; False if there was none."""

    async def counters(self, name: str) -> Counters: ...

    async def open_attempt(self, request: AttemptRequest) -> OpenResult:
        """Join a rank's process to the job's current attempt, or open the next one.

        With `launch`, all calls of one launch share an attempt. Without it, an attempt takes one process of each rank;
        once it has one of every rank, another process of any rank opens the next. A process whose attempt is not the
        current one any more is SUPERSEDED, unless nothing was decided in its attempt: then it may join the current one.

        Raises:
            JobUnknown: If there is no such job.
        """

    async def announce_reference(self, info: ReferenceInfo, *, ttl_s: float) -> None:
        """Publish a version of a model for `ttl_s` seconds; scorers repeat it while they live."""

    async def record_fingerprint(self, info: ReferenceInfo, fingerprint: bytes) -> bytes:
        """Keep the fingerprint of this version of the model unless it has one; return the one that it has.

        It is kept for 30 days after the last call, so that it outlives what a cache holds of the version.
        """

    async def get_reference(self, name: str) -> ReferenceInfo | None:
        """Return the served version of the model; of several, the one whose first announcement is the latest."""

    async def list_references(self) -> list[Announced]:
        """Return every known version of every model, by model and then newest first."""


class SuperBatchStore(Protocol):
    """Keep super-batches in flight, from the first rank's submission to the decision or dead letter, within limits."""

    async def submit(self, submission: Submission, *, limits: Limits, ttl_s: float, now_s: float) -> SubmitResult:
        """Register one rank's rows.

        The first rank's submission puts the super-batch in flight (`submitted` and `in_flight` grow by one), with
        a deadline `ttl_s` from `now_s` and its `reference` pinned for all ranks, unless as many super-batches are in
        flight as one of the limits allows (JOB_FULL, TENANT_FULL, SERVER_FULL; nothing is stored). REPEATED: the same
        digest was there. CONFLICT: another digest, world size or step was there. DECIDED and DEAD: the super-batch is
        not in flight any more. A later rank's own `reference` is ignored: the result holds the pinned one.

        Raises:
            JobUnknown: If the job was never registered, or was deleted meanwhile.
        """

    async def get_super_batch(self, ref: SuperBatchRef) -> SuperBatch | None:
        """Return the super-batch if it is in flight."""

    async def row_counts(self, ref: SuperBatchRef, ranks: Iterable[int]) -> dict[int, int]:
        """Return the number of rows of each of these ranks that has submitted; none if it is not in flight.

        Costs one small field for each rank, however many rows there are.
        """

    async def add_upload(
        self,
        ref: SuperBatchRef,
        rank: int,
        *,
        digest: str,
        positions: tuple[int, ...],
        shards: Sequence[Shard],
        limits: Limits,
    ) -> UploadStatus:
        """Queue all shards of one upload or none; an upload of the same rank and digest is queued once.

        A `shard_id` names one shard of its super-batch, whichever upload brought it. All shards of an upload are for
        the super-batch's reference. Limits are on bytes of features that wait or are being scored.
        """

    async def bytes_held(self, job: str) -> Limits:
        """Bytes of features that wait or are being scored: of the job, of its tenant if it has one, of all jobs."""

    async def get_results(self, ref: SuperBatchRef) -> list[ShardResult]:
        """Return the results of all scored shards of a super-batch in flight."""

    def events(self) -> AsyncIterator[SuperBatchEvent]:
        """Yield an event for each shard scored and each super-batch decided, dead-lettered or deleted from now on.

        Survives reconnects, with repeats; a listener that is thousands behind misses some.
        """


class ShardQueue(Protocol):
    """Hand each queued shard to one scorer at a time, fairly between jobs, until one of them completes it."""

    async def claim(self, consumer: str, reference: ReferenceInfo, *, count: int, block_s: float) -> list[Claim]:
        """Claim up to `count` waiting shards for this model and version, waiting up to `block_s` for the first.

        Jobs share by weight (`fair_queueing.StartTimeFairQueue`); of a job's shards the earliest deadline is first,
        equal ones in order of super-batch and shard id. Shards whose super-batch is no longer in flight are dropped.
        A cancelled claim may have claimed shards all the same: `reclaim` returns them.
        """

    async def reclaim(self, consumer: str, reference: ReferenceInfo, *, idle_s: float, count: int) -> list[Claim]:
        """Take over up to `count` shards whose consumer has sent no heartbeat for `idle_s` seconds."""

    async def heartbeat(self, consumer: str, claims: Sequence[Claim]) -> None:
        """Reset the idle time of the claims that the consumer still has, so that they are not reclaimed."""

    async def complete(self, claim: Claim, result: ShardResult) -> None:
        """Store the result, remove the shard from the queue and publish an event, once, for the first consumer."""

    async def release(self, consumer: str, claims: Sequence[Claim]) -> None:
        """Put the claims that the consumer still has back into the queue; this delivery is not counted."""

    async def queue_states(self) -> list[QueueState]:
        """Return every model queue that holds a shard, by model and version."""

    async def depth(self) -> int:
        """Return the number of shards queued or being scored."""

    async def oldest_age_s(self, *, now_s: float) -> float:
        """Return the age of the oldest shard queued or being scored; 0 if there is none."""


class DecisionLog(Protocol):
    """Take each super-batch out of flight once, by a decision or a dead letter, and keep the record of it."""

    async def decide(self, decision: Decision, *, keep_s: float, keep_count: int = 10_000) -> Decision:
        """Record the decision and take the super-batch out of flight, once.

        The record is kept for `keep_s` seconds, or until there are `keep_count` newer ones of the job.
        Returns the recorded decision, the earlier one if there was one. Counters grow only with the first. What the
        super-batch held (features, results, queued shards) is released.

        Raises:
            DeadLettered: If the super-batch was dead-lettered before.
            SuperBatchUnknown: If it is neither in flight nor decided.
        """

    async def get_decision(self, ref: SuperBatchRef) -> Decision | None: ...

    async def list_decisions(self, job: str, *, before: str, limit: int) -> tuple[list[Decision], str]:
        """Return up to `limit` decisions, those first that are kept longest, and where the next page starts.

        `before` is empty for the first page, else what the previous page returned; that is empty with the last page.
        """

    async def dead_letter(self, letter: DeadLetter) -> bool:
        """Take the super-batch out of flight, keep the dead letter, publish an event; False if it was not in flight."""

    async def dead_letter_superseded(self, job: str, attempt: int, *, now_s: float) -> list[DeadLetter]:
        """Dead-letter (reason SUPERSEDED) the job's super-batches in flight of attempts before this one."""

    async def dead_letter_overdue(self, *, now_s: float) -> list[DeadLetter]:
        """Dead-letter (reason EXPIRED) every super-batch in flight whose deadline has passed."""

    async def dead_letter_unserved(self, *, grace_s: float, now_s: float) -> list[DeadLetter]:
        """Dead-letter (reason REFERENCE_CHANGED) every super-batch whose reference version was replaced.

        That is every super-batch with shards for a version that was not announced for `grace_s` seconds, while
        another version of the same model is.
        """

    async def get_dead_letter(self, ref: SuperBatchRef) -> DeadLetter | None: ...

    async def list_dead_letters(self, job: str, *, limit: int) -> list[DeadLetter]:
        """Return the newest `limit` dead letters of the job, newest first."""

    async def drop_dead_letter(self, ref: SuperBatchRef) -> bool:
        """Delete a dead letter; False if there was none. The counters keep counting it as dead-lettered.

        Its id may be submitted anew, as another super-batch.
        """

    async def requeue(
        self, ref: SuperBatchRef, reference: ReferenceInfo | None, *, limits: Limits, ttl_s: float, now_s: float
    ) -> RequeueStatus:
        """Put a dead-lettered super-batch back in flight as it was submitted, for `reference`, without its uploads.

        `dead_lettered` shrinks and `in_flight` grows by one. What was submitted is kept for a day, and of each job
        for the newest 100 dead letters.
        """


@dataclass(frozen=True)
class Stores:
    """The four stores of the queue over one connection, for the process that opens and closes it."""

    connection: StoreConnection
    jobs: JobStore
    super_batches: SuperBatchStore
    queue: ShardQueue
    decisions: DecisionLog


class EmbeddingCache(Protocol):
    """Keep reference embeddings by example key; may evict any value at any moment, but never returns part of one.

    A value is `[2, D]` f16 bytes, image before text. The key space is model name, version and preprocessing id, and
    the precision in which a cache keeps values.
    """

    def for_tenant_of(self, job: str) -> EmbeddingCache:
        """Return the cache as this job may see it: what its own tenant put there, unless tenants share it."""

    async def get(self, reference: ReferenceInfo, keys: Sequence[str]) -> list[bytes | None]:
        """Return one value or None for each key, in order; a value of a wrong length counts as absent."""

    async def put(self, reference: ReferenceInfo, values: Mapping[str, bytes]) -> dict[str, bytes]:
        """Store values, each of the right length, and return them as `get` will return them, rounded.

        The first value of a key wins: it stays, and is what is returned.

        Raises:
            ValueError: If a value is not finite; of its batch nothing is stored.
        """

    async def take(
        self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str, ttl_s: float
    ) -> list[bytes | Lease]:
        """Return one value for each key or, where there is none, who holds the lease to compute it.

        The holder of a lease puts the value, then releases the lease, and renews it within every `ttl_s` seconds
        until then; so a value is computed once, unless its holder goes silent or the cache evicts it.
        """

    async def renew(self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str, ttl_s: float) -> None:
        """Extend the owner's leases on these keys by `ttl_s`; those that it lost stay lost."""

    async def release_leases(self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str) -> None:
        """End the owner's leases on these keys, so that others need not wait."""

    async def stats(self) -> CacheStats:
        """Return how full the cache is, and how often lookups found a value."""

    async def ping(self) -> None:
        """Raise `StoreUnavailable` unless the cache answers."""

    async def close(self) -> None: ...


class ReferenceModel(Protocol):
    """A frozen two-tower model that embeds examples."""

    async def info(self) -> ReferenceInfo:
        """Read name, version, scale, bias, preprocessing id and inputs from the model's own configuration."""

    async def embed(self, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """Embed n examples, cut into as many inferences as the model's batch limit asks for.

        Args:
            inputs: By input name, `[n, ...]` in the datatype that `info` returns.

        Returns:
            `[n, 2, D]` float32, image before text.

        Raises:
            ReferenceModelError: If an inference failed after the retries that make sense.
        """

    async def fingerprint(self, reference: ReferenceInfo) -> npt.NDArray[np.float32]:
        """Embed fixed probe examples, `[n, 2, D]` float32: what tells the weights of one version from others.

        Raises:
            ReferenceModelError: If they cannot be embedded, or the model is not `reference` any more.
        """

    async def ready(self) -> bool:
        """Return whether a real inference works now."""

    async def close(self) -> None: ...


class ExampleSources(Protocol):
    """Read examples that were named by reference."""

    async def inputs(self, reference: ReferenceInfo, sources: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Return the reference model's inputs of examples, `[n, ...]` by name.

        Raises:
            UnreadableSource: If a source is not allowed or not readable.
        """
