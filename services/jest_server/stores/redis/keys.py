"""Every key of the queue's Redis: its type, its meaning and how long it lives.

All keys share one hash tag, so that a Redis Cluster keeps them in one slot and the scripts may touch several of them.
QUEUE is a digest that names a version of a reference model.
"Backstop" is a time to live far beyond the super-batch's own: nothing is left for good, whichever process dies when.

| key | type | meaning | lives |
|---|---|---|---|
| {jest}:jobs | hash | job name -> Job (JSON) | until deleted |
| {jest}:weights | hash | job name -> its weight | until deleted |
| {jest}:counters:JOB | hash | the job's counters, one field each | until deleted |
| {jest}:attempt:JOB | hash | the current attempt and its processes, see open_attempt.lua | until the job is deleted |
| {jest}:attempt_members:JOB | zset | processes and launches by number of attempt, the newest 100,000 | likewise |
| {jest}:in_flight | zset | JOB/ID by deadline (s): exactly the super-batches in flight | until empty |
| {jest}:usage | hash | super-batches in flight and bytes of features, see usage.lua | an entry until it is 0 |
| {jest}:super_batch:JOB/ID | hash | see below | until decided; backstop |
| {jest}:features:JOB/ID/SHARD | string | what a scorer embeds: keys and input tensors | until scored; backstop |
| {jest}:results:JOB/ID | hash | shard id -> embeddings | until decided; backstop |
| {jest}:decision:JOB/ID | string | Decision (JSON) | as long as asked for |
| {jest}:decisions:JOB | zset | ids of the job's decisions by their end (ms) | as long as the last of them |
| {jest}:dead_letters:JOB | hash | super-batch id -> DeadLetter (JSON), the newest 1,000 | 30 days after the last |
| {jest}:dead_letter_order:JOB | zset | super-batch ids by time (s) | with the dead letters |
| {jest}:kept_inputs:JOB/ID | hash | what was submitted of a dead-lettered super-batch, of the newest 100 | a day |
| {jest}:models | set | names of reference models that were announced | until all their versions are forgotten |
| {jest}:reference:MODEL | hash | version -> ReferenceInfo as announced, since when, until when (JSON) | a day |
| {jest}:fingerprints:MODEL | hash | version -> first fingerprint of its weights (f16) | 30 days after the last use |
| {jest}:queued | zset | JOB/ID/SHARD by time of queueing (ms): shards waiting or being scored | until empty |
| {jest}:model_queues | hash | QUEUE -> model and version (JSON) | an entry while the model's versions are remembered |
| {jest}:heartbeats:QUEUE | zset | JOB/ID/SHARD by last heartbeat (µs): exactly the shards being scored | until empty |
| {jest}:waiting_jobs:QUEUE, idle_jobs:, virtual_time:, waiting:, wakeup: | see fair_queue.lua | shards | until empty |
| {jest}:events | stream | what was scored or left flight, about the newest 4,096 | capped |

Fields of a super-batch: world_size, reference (JSON), created_at (s), step, queue; of each rank digest:RANK,
rank:RANK (Submission, JSON), rows:RANK, upload:RANK:DIGEST (positions, JSON); of each shard to score shard:SHARD (how
often it was delivered) and, while it is being scored, claimed_by:SHARD (consumer).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b

from jest_server.domain.super_batches import SuperBatchRef

DEFAULT_PREFIX = "{jest}:"
BACKSTOP_S = 3600.0
"""How much longer than its super-batch anything may live."""
_HASH_TAG = re.compile(r"\{[^{}]+\}")


@dataclass(frozen=True)
class Keys:
    """Names of all keys under one prefix; servers with different prefixes may share a Redis.

    Raises:
        ValueError: If the prefix has no hash tag.
    """

    prefix: str = DEFAULT_PREFIX

    def __post_init__(self) -> None:
        if not _HASH_TAG.search(self.prefix):
            raise ValueError(f"key prefix {self.prefix!r} has no hash tag; expected something like {DEFAULT_PREFIX!r}")

    @property
    def jobs(self) -> str:
        """All jobs."""
        return f"{self.prefix}jobs"

    @property
    def weights(self) -> str:
        """Weights of all jobs."""
        return f"{self.prefix}weights"

    @property
    def usage(self) -> str:
        """How much is held."""
        return f"{self.prefix}usage"

    @property
    def in_flight(self) -> str:
        """Super-batches in flight, of all jobs."""
        return f"{self.prefix}in_flight"

    @property
    def models(self) -> str:
        """Reference models that were announced."""
        return f"{self.prefix}models"

    @property
    def queued(self) -> str:
        """Shards of all model queues, waiting or being scored."""
        return f"{self.prefix}queued"

    @property
    def model_queues(self) -> str:
        """What each model queue is for."""
        return f"{self.prefix}model_queues"

    @property
    def events(self) -> str:
        """Stream of events."""
        return f"{self.prefix}events"

    def heartbeats(self, queue: str) -> str:
        """Shards of a model queue that are being scored."""
        return f"{self.prefix}heartbeats:{queue}"

    def waiting_jobs(self, queue: str) -> str:
        """Jobs with waiting shards in a model queue."""
        return f"{self.prefix}waiting_jobs:{queue}"

    def waiting(self, queue: str, job: str) -> str:
        """A job's waiting shards in a model queue."""
        return f"{self.prefix}waiting:{queue}:{job}"

    def wakeup(self, queue: str) -> str:
        """What scorers wait on for a shard to arrive in a model queue."""
        return f"{self.prefix}wakeup:{queue}"

    def counters(self, job: str) -> str:
        """A job's counters."""
        return f"{self.prefix}counters:{job}"

    def attempt(self, job: str) -> str:
        """A job's current attempt."""
        return f"{self.prefix}attempt:{job}"

    def attempt_members(self, job: str) -> str:
        """Processes and launches of a job's attempts."""
        return f"{self.prefix}attempt_members:{job}"

    def super_batch(self, ref: SuperBatchRef) -> str:
        """A super-batch in flight."""
        return f"{self.prefix}super_batch:{member(ref)}"

    def features(self, ref: SuperBatchRef, shard_id: str) -> str:
        """A shard's features."""
        return f"{self.prefix}features:{member(ref)}/{shard_id}"

    def results(self, ref: SuperBatchRef) -> str:
        """A super-batch's shard results."""
        return f"{self.prefix}results:{member(ref)}"

    def decision(self, ref: SuperBatchRef) -> str:
        """A recorded decision."""
        return f"{self.prefix}decision:{member(ref)}"

    def decisions(self, job: str) -> str:
        """Index of a job's decisions."""
        return f"{self.prefix}decisions:{job}"

    def dead_letters(self, job: str) -> str:
        """A job's dead letters."""
        return f"{self.prefix}dead_letters:{job}"

    def dead_letter_order(self, job: str) -> str:
        """Order of a job's dead letters."""
        return f"{self.prefix}dead_letter_order:{job}"

    def kept_inputs(self, ref: SuperBatchRef) -> str:
        """What was submitted of a dead-lettered super-batch."""
        return f"{self.prefix}kept_inputs:{member(ref)}"

    def reference(self, model: str) -> str:
        """What a reference model's scorers announced, by version."""
        return f"{self.prefix}reference:{model}"

    def fingerprints(self, model: str) -> str:
        """The first fingerprints of a reference model's versions."""
        return f"{self.prefix}fingerprints:{model}"


def member(ref: SuperBatchRef) -> str:
    """Return the super-batch's name in keys and sorted sets; neither part can contain a slash."""
    return f"{ref.job}/{ref.super_batch_id}"


def ref_of(member: str) -> SuperBatchRef:
    """Return the super-batch of this name, or the one that a longer name of a shard starts with."""
    job, super_batch_id = member.split("/")[:2]
    return SuperBatchRef(job, super_batch_id)


def queue_of(model: str, version: str) -> str:
    """Name the model queue in which shards wait for a version of a reference model."""
    return blake2b(f"{model}\0{version}".encode(), digest_size=8).hexdigest()
