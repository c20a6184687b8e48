"""What the use cases need from the outside world; each has a real adapter and an in-memory twin in `stores`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from jest_server.domain.dead_letters import DeadLetter, RequeueStatus
    from jest_server.domain.decisions import Decision
    from jest_server.domain.jobs import Counters, Job, JobSpec
    from jest_server.domain.references import Announced, ReferenceInfo
    from jest_server.domain.shards import Claim, QueueState, Shard, ShardResult
    from jest_server.domain.storage import CacheStats, Lease, MemoryUse
    from jest_server.domain.super_batches import (
        Limits,
        Submission,
        SubmitStatus,
        SuperBatch,
        SuperBatchEvent,
        UploadStatus,
    )


class SuperBatchStore(Protocol):
    """Jobs, super-batches in flight, the queue of shards, and decisions. Nothing in it may be evicted.

    Every method that changes something is atomic, may be repeated, and keeps
    ``submitted == selected + dead_lettered + in_flight`` true at every moment, across the death of any caller.
    A store that does not answer raises ``StoreUnavailable``.
    """

    async def ping(self) -> None:
        """Raises ``StoreUnavailable`` unless the store answers."""

    async def close(self) -> None:
        """Gives all connections back."""

    # Jobs

    async def create_job(self, spec: JobSpec, *, now_s: float) -> tuple[Job, bool]:
        """Registers the job unless the name is taken; returns what is registered and whether this call did it."""

    async def get_job(self, name: str) -> Job | None: ...

    async def list_jobs(self, *, after: str, limit: int) -> list[Job]:
        """Returns up to ``limit`` jobs whose names sort after ``after``, in order of name."""

    async def delete_job(self, name: str) -> bool:
        """Forgets the job, its super-batches, queued shards, dead letters and decisions; False if there was none."""

    async def counters(self, name: str) -> Counters: ...

    # Reference models that scorers serve at the moment

    async def announce_reference(self, info: ReferenceInfo, *, ttl_s: float) -> None:
        """Publishes a version of a model for ``ttl_s`` seconds; scorers repeat it while they live."""

    async def get_reference(self, name: str) -> ReferenceInfo | None:
        """Returns the model as it is served: of several versions the one that was announced last for the first time."""

    async def list_references(self) -> list[Announced]:
        """Returns every version of every model that is remembered, by model and then newest first."""

    # Super-batches

    async def submit(self, submission: Submission, *, limits: Limits, ttl_s: float, now_s: float) -> SubmitStatus:
        """Registers one rank's rows.

        The first rank's submission puts the super-batch in flight (``submitted`` and ``in_flight`` grow by one), with
        a deadline ``ttl_s`` from ``now_s`` and its ``reference`` pinned for all ranks, unless as many super-batches
        are there as one of the limits allows (JOB_FULL, TENANT_FULL, SERVER_FULL; nothing is stored). REPEATED: the
        same digest was there. CONFLICT: another digest, world size or step was there. DECIDED and DEAD: the super-batch
        is not in flight any more. A later rank's own ``reference`` is ignored: ``get_super_batch`` tells the pinned
        one.

        Raises:
            JobUnknown: If the job was never registered, or was deleted meanwhile.
        """

    async def get_super_batch(self, job: str, super_batch_id: str) -> SuperBatch | None:
        """Returns the super-batch if it is in flight."""

    async def get_dead_letter(self, job: str, super_batch_id: str) -> DeadLetter | None: ...

    async def list_dead_letters(self, job: str, *, limit: int) -> list[DeadLetter]:
        """Returns the newest ``limit`` dead letters of the job, newest first."""

    async def drop_dead_letter(self, job: str, super_batch_id: str) -> bool:
        """Forgets a dead letter; False if there was none. The accounts go on counting it as dead-lettered.

        Its id may be submitted anew, as another super-batch.
        """

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
        """Puts a dead-lettered super-batch back in flight as it was submitted, for ``reference``, without its uploads.

        ``dead_lettered`` shrinks and ``in_flight`` grows by one. What was submitted is kept for a day, and of each job
        for the newest 100 letters.
        """

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
        """Queues all shards of one upload or none; an upload of the same rank and digest is queued once.

        A ``shard_id`` names one shard of its super-batch, whichever upload brought it. All shards of an upload are for
        the super-batch's reference. Limits are on bytes of features that wait or are being scored.
        """

    async def bytes_held(self, job: str) -> Limits:
        """Bytes of features that wait or are being scored: of the job, of its tenant if it has one, of all jobs."""

    async def get_results(self, job: str, super_batch_id: str) -> list[ShardResult]:
        """Returns the results of all scored shards of a super-batch in flight."""

    async def decide(self, decision: Decision, *, keep_s: float, keep_count: int = 10_000) -> Decision:
        """Records the decision and takes the super-batch out of flight, once.

        The record is kept for ``keep_s`` seconds, or until there are ``keep_count`` newer ones of the job.
        Returns the recorded decision, the earlier one if there was one. Counters grow only with the first. What the
        super-batch held (features, results, queued shards) is released.

        Raises:
            DeadLettered: If the super-batch was dead-lettered before.
            SuperBatchUnknown: If it is neither in flight nor decided.
        """

    async def get_decision(self, job: str, super_batch_id: str) -> Decision | None: ...

    async def list_decisions(self, job: str, *, before: str, limit: int) -> tuple[list[Decision], str]:
        """Returns up to ``limit`` decisions that are kept, those first that are kept longest, and where to go on.

        ``before`` is empty for the first page, else what the page before returned; that is empty with the last page.
        """

    async def dead_letter(self, letter: DeadLetter) -> bool:
        """Takes the super-batch out of flight, keeps the letter and tells the news; False if it was not in flight."""

    async def dead_letter_overdue(self, *, now_s: float) -> list[DeadLetter]:
        """Dead-letters (reason EXPIRED) every super-batch in flight whose deadline has passed."""

    async def dead_letter_unserved(self, *, grace_s: float, now_s: float) -> list[DeadLetter]:
        """Dead-letters (reason REFERENCE_CHANGED) what nobody is going to score.

        That is every super-batch with shards for a version that was not announced for ``grace_s`` seconds, while
        another version of the same model is.
        """

    # The queue between selector and scorers

    async def claim(self, consumer: str, reference: ReferenceInfo, *, count: int, block_s: float) -> list[Claim]:
        """Takes up to ``count`` shards for this model and version that nobody has, waiting for the first.

        Jobs share by weight (``fair_queueing.StartTimeFairQueue``); of a job's shards the earliest deadline is first,
        equal ones in order of super-batch and shard id. Shards whose super-batch is no longer in flight are dropped.
        A cancelled claim may have taken shards all the same: ``reclaim`` returns them.
        """

    async def reclaim(self, consumer: str, reference: ReferenceInfo, *, idle_s: float, count: int) -> list[Claim]:
        """Takes over up to ``count`` of such shards that their consumer has not touched for ``idle_s`` seconds."""

    async def keep(self, consumer: str, claims: Sequence[Claim]) -> None:
        """Tells that the consumer is still at work on these, so that nobody reclaims them."""

    async def complete(self, claim: Claim, result: ShardResult) -> None:
        """Stores the result, acknowledges the shard and tells the news, once, whichever consumer comes first."""

    async def release(self, consumer: str, claims: Sequence[Claim]) -> None:
        """Hands unfinished shards back, for another consumer to take at once; their deliveries do not grow by this."""

    async def lines(self) -> list[QueueState]:
        """Returns every line that holds a shard, by model and version."""

    async def memory(self) -> MemoryUse:
        """Returns what its server uses, and may use."""

    async def queue_depth(self) -> int:
        """Shards queued or being scored."""

    async def oldest_queued_age_s(self, *, now_s: float) -> float:
        """Age of the oldest shard queued or being scored; 0 if there is none."""

    def news(self) -> AsyncIterator[SuperBatchEvent]:
        """Yields what is scored, decided, dead-lettered or deleted from the first step on.

        Survives reconnects, with repeats; a listener that is thousands behind misses some.
        """


class EmbeddingCache(Protocol):
    """Reference embeddings by example key. May forget anything at any moment; never returns anything half.

    A value is ``[2, D]`` f16 bytes, image before text. The key space is model name, version and preprocessing id, and
    the precision in which a cache keeps values.
    """

    def of_job(self, job: str) -> EmbeddingCache:
        """Returns the cache as this job may know it: what its own tenant put there, unless tenants share it."""

    async def get(self, reference: ReferenceInfo, keys: Sequence[str]) -> list[bytes | None]:
        """Returns one value or None for each key, in order; a value of a wrong length counts as absent."""

    async def put(self, reference: ReferenceInfo, values: Mapping[str, bytes]) -> dict[str, bytes]:
        """Keeps values, each of the right length, and returns them as ``get`` will give them, rounded.

        Who comes first wins: a value that was there stays, and is what is returned.
        """

    async def take(
        self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str, ttl_s: float
    ) -> list[bytes | Lease]:
        """Returns one value for each key or, where there is none, whose it is to compute it.

        Whoever has a lease puts the value, then gives the lease back, and renews it within every ``ttl_s`` seconds
        until then; so a value costs one computation, unless its computer goes silent or the cache forgets.
        """

    async def renew(self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str, ttl_s: float) -> None:
        """Lets the owner's leases on these keys live on for ``ttl_s``; those that it lost stay lost."""

    async def give_back(self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str) -> None:
        """Ends the owner's leases on these keys, so that others need not wait."""

    async def stats(self) -> CacheStats:
        """Returns how full the cache is, and how often it had what was asked for."""

    async def ping(self) -> None:
        """Raises ``StoreUnavailable`` unless the cache answers."""

    async def close(self) -> None: ...


class ReferenceModel(Protocol):
    """A frozen two-tower model that embeds examples."""

    async def info(self) -> ReferenceInfo:
        """Reads name, version, scale, bias, preprocessing id and inputs from the model's own configuration."""

    async def embed(self, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """Embeds n examples, cut into as many inferences as the model's batch limit asks for.

        Args:
            inputs: By input name, ``[n, ...]`` in the datatype that ``info`` tells.

        Returns:
            ``[n, 2, D]`` float32, image before text.

        Raises:
            ReferenceModelError: If an inference failed after the retries that make sense.
        """

    async def ready(self) -> bool:
        """Tells whether a real inference works now."""

    async def close(self) -> None: ...


class ExampleSources(Protocol):
    """Reads examples that were named by reference."""

    async def inputs(self, reference: ReferenceInfo, sources: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Returns the reference model's inputs of examples, ``[n, ...]`` by name.

        Raises:
            UnreadableSource: If one may not or cannot be read.
        """
