"""Small super-batches for tests of stores, and the steps of their lives."""

from __future__ import annotations

import time
import uuid

from jest_server.domain.dead_letters import DeadLetter
from jest_server.domain.decisions import Decision
from jest_server.domain.jobs import JobSpec
from jest_server.domain.policies import PolicySpec
from jest_server.domain.references import ReferenceInfo, ReferenceInput
from jest_server.domain.shards import Shard, ShardResult
from jest_server.domain.super_batches import Limits, Submission, SuperBatchRef

REFERENCE = ReferenceInfo(
    name="ref",
    version="1",
    preprocessing_id="p",
    scale=10.0,
    bias=-10.0,
    embedding_width=2,
    inputs=(ReferenceInput(name="x", datatype="FP32", shape=(3,)),),
)


def reference_of_pictures(*, side, **fields):
    """The same, but of pictures with captions."""
    inputs = (
        ReferenceInput(name="image", datatype="UINT8", shape=(3, side, side)),
        ReferenceInput(name="tokens", datatype="INT32", shape=(-1,)),
    )
    return REFERENCE.model_copy(update={"inputs": inputs} | fields)


def key_prefix():
    """A prefix that no other test uses, so that tests may share a server."""
    return f"{{test-{uuid.uuid4().hex[:12]}}}:"


def spec(name, **fields):
    return JobSpec(name=name, reference_model="ref", policy=PolicySpec(sub_batch_size=16), **fields)


def submission(
    job,
    super_batch_id="sb",
    *,
    rank=0,
    world_size=1,
    digest="d",
    keys=("a", "b"),
    reference=REFERENCE,
    step=0,
    **fields,
):
    return Submission(
        job=job,
        super_batch_id=super_batch_id,
        rank=rank,
        world_size=world_size,
        reference=reference,
        keys=keys,
        digest=digest,
        step=step,
        **fields,
    )


async def submit(stores, *args, max_in_flight=100, tenant=0, server=0, ttl_s=60.0, now_s=None, **fields):
    now_s = time.time() if now_s is None else now_s
    limits = Limits(job=max_in_flight, tenant=tenant, server=server)
    result = await stores.super_batches.submit(submission(*args, **fields), limits=limits, ttl_s=ttl_s, now_s=now_s)
    return result.status


def shard(job, super_batch_id="sb", number=0, features=b"features", digest="u", version="1"):
    return Shard(f"0-{digest}-{number:03d}", job, super_batch_id, "ref", version, ("a", "b"), features)


async def upload(
    stores, job, super_batch_id="sb", *, shards=1, digest="u", features=b"features", limits=None, **fields
):
    pieces = [shard(job, super_batch_id, number, features, digest, **fields) for number in range(shards)]
    return await stores.super_batches.add_upload(
        SuperBatchRef(job, super_batch_id), 0, digest=digest, positions=(0, 1), shards=pieces, limits=limits or Limits()
    )


def result_of(claim, inferred=2):
    return ShardResult(claim.shard.keys, b"\x00" * 16, inferred)


def decision(job, super_batch_id="sb", **fields):
    values = {
        "policy": PolicySpec(sub_batch_size=16),
        "seed": 7,
        "step": 0,
        "reference": REFERENCE,
        "learner_digests": {0: "l"},
        "submission_digests": {0: "d"},
        "positions": {0: (1, 0)},
        "sub_batch_size": 2,
        "super_batch_size": 10,
        "perplexity": (1.5, 2.5),
        "cache_hits": 6,
        "reference_inferences": 4,
        "fallback": None,
        "fallback_reason": "",
        "timings_s": {"compute": 0.25},
        "decided_at_s": 3.0,
    }
    return Decision(job=job, super_batch_id=super_batch_id, **values | fields)


def dead_letter(job, super_batch_id="sb", at_s=5.0):
    return DeadLetter(job=job, super_batch_id=super_batch_id, reason="R", detail="why", at_s=at_s)


async def accounts(stores, job):
    """Returns submitted, selected, dead-lettered and in flight, which always balance."""
    c = await stores.jobs.counters(job)
    assert c.submitted == c.selected + c.dead_lettered + c.in_flight
    return c.submitted, c.selected, c.dead_lettered, c.in_flight


async def queue_one(stores, job="job", super_batch_id="sb", **fields):
    """Registers the job and puts a super-batch of one queued shard in flight."""
    await stores.jobs.create_job(spec(job), now_s=time.time())
    await submit(stores, job, super_batch_id)
    await upload(stores, job, super_batch_id, **fields)
