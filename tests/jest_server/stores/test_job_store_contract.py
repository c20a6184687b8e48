"""Every JobStore, the in-memory twin, Valkey and Redis: jobs and announced reference models."""

from __future__ import annotations

import asyncio
import time

from jest_server.domain.super_batches import SubmitStatus, SuperBatchRef
from support.polling import wait_for, within
from support.super_batches import (
    REFERENCE,
    accounts,
    dead_letter,
    decision,
    result_of,
    spec,
    submit,
    upload,
)


async def test_a_job_is_registered_once_and_stays_what_it_was(stores):
    name = "job"
    first, created = await stores.jobs.create_job(spec(name, seed=1), now_s=1.0)
    again, created_again = await stores.jobs.create_job(spec(name, seed=2), now_s=2.0)
    assert (created, created_again) == (True, False)
    assert again == first == await stores.jobs.get_job(name)
    assert (first.spec.seed, first.created_at_s) == (1, 1.0)


async def test_of_many_who_create_a_job_at_once_one_does(stores):
    name = "job"
    answers = await asyncio.gather(*(stores.jobs.create_job(spec(name, seed=i), now_s=1.0) for i in range(20)))
    assert sum(created for _, created in answers) == 1
    assert len({job.spec.seed for job, _ in answers}) == 1


async def test_jobs_are_listed_in_order_from_a_name_on(stores):
    for name in "cab":
        await stores.jobs.create_job(spec(name), now_s=1.0)
    assert [job.spec.name for job in await stores.jobs.list_jobs(after="", limit=2)] == ["a", "b"]
    assert [job.spec.name for job in await stores.jobs.list_jobs(after="b", limit=2)] == ["c"]
    assert await stores.jobs.list_jobs(after="", limit=0) == []


async def test_a_deleted_job_leaves_nothing(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    await submit(stores, job, "decided")
    await stores.decisions.decide(decision(job, "decided"), keep_s=60)
    await submit(stores, job, "dead")
    await stores.decisions.dead_letter(dead_letter(job, "dead"))
    assert await stores.jobs.delete_job(job)
    assert not await stores.jobs.delete_job(job)
    assert await stores.jobs.get_job(job) is None
    assert await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb")) is None
    assert await stores.decisions.get_decision(SuperBatchRef(job, "decided")) is None
    assert await stores.decisions.list_dead_letters(job, limit=10) == []
    assert await accounts(stores, job) == (0, 0, 0, 0)
    assert await stores.queue.depth() == 0
    assert await stores.queue.claim("c", REFERENCE, count=1, block_s=0.05) == []


async def test_a_job_of_a_deleted_ones_name_starts_from_nothing(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    (stale,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    await stores.jobs.delete_job(job)
    assert (await stores.jobs.create_job(spec(job, seed=5), now_s=2.0))[1]
    await stores.queue.complete(stale, result_of(stale))
    await stores.queue.release("c", [stale])
    assert await submit(stores, job, digest="other") is SubmitStatus.ACCEPTED
    assert await stores.super_batches.get_results(SuperBatchRef(job, "sb")) == []
    assert (await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb"))).pending_shards == 0
    assert await accounts(stores, job) == (1, 0, 0, 1)
    assert await stores.queue.depth() == 0


async def test_deleting_a_job_leaves_others_alone(stores, job):
    await stores.jobs.create_job(spec("job-2"), now_s=1.0)
    for name in (job, "job-2"):
        await submit(stores, name)
        await upload(stores, name)
    await stores.jobs.delete_job(job)
    assert await accounts(stores, "job-2") == (1, 0, 0, 1)
    (claim,) = await stores.queue.claim("c", REFERENCE, count=5, block_s=1)
    assert claim.shard.job == "job-2"


async def test_an_announcement_lasts_as_long_as_it_says(stores):
    assert await stores.jobs.get_reference("ref") is None
    await stores.jobs.announce_reference(REFERENCE, ttl_s=0.3)
    assert await stores.jobs.get_reference("ref") == REFERENCE

    async def forgotten():
        return await stores.jobs.get_reference("ref") is None

    with within(2):
        await wait_for(forgotten)


NEWER = REFERENCE.model_copy(update={"version": "2"})


async def test_references_tell_every_version_and_whether_it_is_served(stores):
    assert await stores.jobs.list_references() == []
    await stores.jobs.announce_reference(REFERENCE, ttl_s=0.2)
    await asyncio.sleep(0.02)
    await stores.jobs.announce_reference(NEWER, ttl_s=60)
    await stores.jobs.announce_reference(REFERENCE.model_copy(update={"name": "another"}), ttl_s=60)
    await asyncio.sleep(0.4)
    found = await stores.jobs.list_references()
    assert [(known.reference.name, known.reference.version, known.served) for known in found] == [
        ("another", "1", True),
        ("ref", "2", True),
        ("ref", "1", False),
    ]
    assert found[1].reference == NEWER
    assert all(abs(known.since_s - time.time()) < 60 for known in found)


async def test_of_two_versions_that_are_served_the_one_announced_last_for_the_first_time_is_taken(stores):
    await stores.jobs.announce_reference(REFERENCE, ttl_s=60)
    await asyncio.sleep(0.01)
    await stores.jobs.announce_reference(NEWER, ttl_s=0.5)
    await stores.jobs.announce_reference(REFERENCE, ttl_s=60)
    assert await stores.jobs.get_reference("ref") == NEWER
    await asyncio.sleep(0.6)
    assert await stores.jobs.get_reference("ref") == REFERENCE
    await stores.jobs.announce_reference(NEWER, ttl_s=60)  # back after a pause
    assert await stores.jobs.get_reference("ref") == NEWER


async def test_the_first_fingerprint_of_each_version_is_kept(stores):
    record = stores.jobs.record_fingerprint
    assert await record(REFERENCE, b"\x00first\xff") == b"\x00first\xff"
    assert await record(REFERENCE, b"second") == b"\x00first\xff"
    assert await record(NEWER, b"third") == b"third"
    assert await record(REFERENCE.model_copy(update={"name": "another"}), b"fourth") == b"fourth"
    assert await record(REFERENCE, b"fifth") == b"\x00first\xff"


async def test_of_many_fingerprints_at_once_all_learn_of_the_same_one(stores):
    answers = await asyncio.gather(*(stores.jobs.record_fingerprint(REFERENCE, bytes([i])) for i in range(20)))
    assert len(set(answers)) == 1
