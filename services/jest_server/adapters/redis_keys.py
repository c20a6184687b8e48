"""Every key of the queue's Redis: its type, its meaning and how long it lives.

All keys share one hash tag, so that a Redis Cluster keeps them in one slot and the scripts may touch several of them.
"Backstop" is a time to live far beyond the super-batch's own: nothing is ever left for good, whatever dies when.

| key | type | meaning | lives |
|---|---|---|---|
| {jest}:jobs | hash | job name -> Job (JSON) | until deleted |
| {jest}:counters:JOB | hash | the job's accounts, one field each | until deleted |
| {jest}:in_flight | zset | JOB/ID by deadline (s): exactly the super-batches in flight | until empty |
| {jest}:super_batch:JOB/ID | hash | submissions, uploads, shard ids, open shards | until decided; backstop |
| {jest}:features:JOB/ID/SHARD | string | what a scorer embeds: keys and input tensors | until scored; backstop |
| {jest}:results:JOB/ID | hash | shard id -> embeddings | until decided; backstop |
| {jest}:decision:JOB/ID | string | Decision (JSON) | as long as asked for |
| {jest}:dead:JOB | hash | super-batch id -> DeadLetter (JSON), the newest 1,000 | 30 days after the last |
| {jest}:dead_order:JOB | zset | super-batch ids by time (s) | with the letters |
| {jest}:reference:MODEL | string | ReferenceInfo (JSON), announced by scorers | some seconds |
| {jest}:shards | stream | shards queued or being scored; group "scorers" | an entry until scored |
| {jest}:news | stream | what was scored, decided or dead-lettered, the newest 4,096 | capped |
"""

from __future__ import annotations

PREFIX = "{jest}:"
JOBS = f"{PREFIX}jobs"
IN_FLIGHT = f"{PREFIX}in_flight"
SHARDS = f"{PREFIX}shards"
NEWS = f"{PREFIX}news"
GROUP = "scorers"


def member(job: str, super_batch_id: str) -> str:
    """Names a super-batch; neither part can hold a slash."""
    return f"{job}/{super_batch_id}"


def counters(job: str) -> str:
    """Key of a job's accounts."""
    return f"{PREFIX}counters:{job}"


def super_batch(job: str, super_batch_id: str) -> str:
    """Key of a super-batch in flight."""
    return f"{PREFIX}super_batch:{member(job, super_batch_id)}"


def features(job: str, super_batch_id: str, shard_id: str) -> str:
    """Key of a shard's features; with an empty shard id, what all of the super-batch's start with."""
    return f"{PREFIX}features:{member(job, super_batch_id)}/{shard_id}"


def results(job: str, super_batch_id: str) -> str:
    """Key of a super-batch's shard results."""
    return f"{PREFIX}results:{member(job, super_batch_id)}"


def decision(job: str, super_batch_id: str) -> str:
    """Key of a recorded decision."""
    return f"{PREFIX}decision:{member(job, super_batch_id)}"


def dead(job: str) -> str:
    """Key of a job's dead letters."""
    return f"{PREFIX}dead:{job}"


def dead_order(job: str) -> str:
    """Key of the order of a job's dead letters."""
    return f"{PREFIX}dead_order:{job}"


def reference(model: str) -> str:
    """Key of what a reference model's scorers announced."""
    return f"{PREFIX}reference:{model}"
