"""What a person asks a stores, and does to it: history, dead letters again, lines, models, how full the cache is."""

from __future__ import annotations

import asyncio
import time

import pytest

from jest_server.domain.dead_letters import RequeueStatus
from jest_server.domain.shards import QueueState
from jest_server.domain.super_batches import Limits, SubmitStatus, SuperBatchRef, UploadStatus
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

NEWER = REFERENCE.model_copy(update={"version": "2"})


async def requeue(stores, job, super_batch_id="sb", *, reference=REFERENCE, now_s=None, limits=None):
    now_s = time.time() if now_s is None else now_s
    return await stores.decisions.requeue(
        SuperBatchRef(job, super_batch_id), reference, limits=limits or Limits(), ttl_s=60.0, now_s=now_s
    )


async def set_aside(stores, job, super_batch_id="sb", **fields):
    """Submits, uploads and dead-letters a super-batch."""
    await submit(stores, job, super_batch_id, **fields)
    await upload(stores, job, super_batch_id)
    await stores.decisions.dead_letter(dead_letter(job, super_batch_id))


async def test_a_requeued_super_batch_is_in_flight_with_the_rows_it_had_and_no_uploads(stores, job):
    await set_aside(stores, job, world_size=2, step=7, keys=("x", "y"))
    assert await requeue(stores, job, reference=NEWER, now_s=50.0) is RequeueStatus.REQUEUED
    held = await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb"))
    assert (held.world_size, held.step, held.reference, held.created_at_s) == (2, 7, NEWER, 50.0)
    assert held.submissions[0].keys == ("x", "y")
    assert held.submissions[0].reference == NEWER
    assert (held.uploads, held.pending_shards) == ({}, 0)
    assert await stores.decisions.get_dead_letter(SuperBatchRef(job, "sb")) is None
    assert await stores.super_batches.row_counts(held.ref, range(2)) == {0: 2}
    assert await accounts(stores, job) == (1, 0, 0, 1)


async def test_a_requeued_super_batch_goes_on_to_a_decision(stores, job):
    await set_aside(stores, job)
    await requeue(stores, job)
    assert await submit(stores, job) is SubmitStatus.REPEATED
    assert await submit(stores, job, digest="other") is SubmitStatus.CONFLICT
    assert await upload(stores, job) is UploadStatus.ACCEPTED
    (claim,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=0)
    await stores.queue.complete(claim, result_of(claim))
    await stores.decisions.decide(decision(job), keep_s=60)
    assert await accounts(stores, job) == (1, 1, 0, 0)


async def test_a_requeued_super_batch_has_a_deadline_of_its_own(stores, job):
    await set_aside(stores, job)
    await requeue(stores, job, now_s=1000.0)
    assert await stores.decisions.dead_letter_overdue(now_s=1059.0) == []
    assert len(await stores.decisions.dead_letter_overdue(now_s=1061.0)) == 1
    assert await accounts(stores, job) == (1, 0, 1, 0)


async def test_what_was_never_dead_lettered_cannot_be_requeued(stores, job):
    await submit(stores, job)
    assert await requeue(stores, job) is RequeueStatus.NO_LETTER
    assert await requeue(stores, "nobody") is RequeueStatus.NO_LETTER


@pytest.mark.parametrize("whose", ["job", "tenant", "server"])
async def test_requeueing_keeps_the_limits(stores, whose):
    await stores.jobs.create_job(spec("red~job"), now_s=1.0)
    await set_aside(stores, "red~job")
    await submit(stores, "red~job", "other")
    assert await requeue(stores, "red~job", limits=Limits(**{whose: 1})) is RequeueStatus(whose)
    assert await accounts(stores, "red~job") == (2, 0, 1, 1)
    assert await requeue(stores, "red~job", limits=Limits(**{whose: 2})) is RequeueStatus.REQUEUED


async def test_of_many_dead_letters_the_newest_hundred_can_be_requeued(stores, job):
    for number in range(102):
        await submit(stores, job, f"sb-{number}")
        await stores.decisions.dead_letter(dead_letter(job, f"sb-{number}", at_s=float(number)))
    assert await requeue(stores, job, "sb-1") is RequeueStatus.FORGOTTEN
    assert await requeue(stores, job, "sb-2") is RequeueStatus.REQUEUED
    assert await accounts(stores, job) == (102, 0, 101, 1)


async def test_a_dropped_letter_is_forgotten_and_still_counted(stores, job):
    await set_aside(stores, job)
    assert await stores.decisions.drop_dead_letter(SuperBatchRef(job, "sb"))
    assert not await stores.decisions.drop_dead_letter(SuperBatchRef(job, "sb"))
    assert not await stores.decisions.drop_dead_letter(SuperBatchRef("nobody", "sb"))
    assert await stores.decisions.list_dead_letters(job, limit=9) == []
    assert await requeue(stores, job) is RequeueStatus.NO_LETTER
    assert await accounts(stores, job) == (1, 0, 1, 0)
    assert await submit(stores, job, digest="anew") is SubmitStatus.ACCEPTED
    assert await accounts(stores, job) == (2, 0, 1, 1)


async def test_nothing_that_was_set_aside_outlives_its_job(stores, job):
    await set_aside(stores, job)
    await stores.jobs.delete_job(job)
    await stores.jobs.create_job(spec(job), now_s=1.0)
    assert await requeue(stores, job) is RequeueStatus.NO_LETTER


async def test_decisions_are_listed_in_pages_those_kept_longest_first(stores, job):
    for number in range(5):
        await submit(stores, job, f"sb-{number}")
        await stores.decisions.decide(decision(job, f"sb-{number}"), keep_s=60 + number)
    names, before = [], ""
    for _ in range(3):
        page, before = await stores.decisions.list_decisions(job, before=before, limit=2)
        names.append([found.super_batch_id for found in page])
    assert names == [["sb-4", "sb-3"], ["sb-2", "sb-1"], ["sb-0"]]
    assert before == ""
    assert page[0] == decision(job, "sb-0")


async def test_a_full_last_page_has_none_after_it(stores, job):
    await submit(stores, job)
    await stores.decisions.decide(decision(job), keep_s=60)
    assert await stores.decisions.list_decisions(job, before="", limit=1) == ([decision(job)], "")
    assert await stores.decisions.list_decisions("nobody", before="", limit=1) == ([], "")


async def test_lines_tell_what_waits_of_whom_and_what_is_being_scored(stores):
    assert await stores.queue.queue_states() == []
    for name, shards in (("a", 3), ("b", 1)):
        await stores.jobs.create_job(spec(name), now_s=1.0)
        await submit(stores, name)
        await upload(stores, name, shards=shards)
    await submit(stores, "b", "newer", reference=NEWER)
    await upload(stores, "b", "newer", version="2")
    await stores.queue.claim("c", REFERENCE, count=2, block_s=0)
    assert await stores.queue.queue_states() == [
        QueueState(model="ref", version="1", waiting={"a": 2}, scoring=2),
        QueueState(model="ref", version="2", waiting={"b": 1}, scoring=0),
    ]


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


async def test_a_store_tells_what_its_server_uses_and_uploads_add_to_it(stores, job):
    before = await stores.connection.memory()
    await submit(stores, job)
    await upload(stores, job, features=b"f" * (4 << 20))
    after = await stores.connection.memory()
    assert after.used_bytes >= before.used_bytes + (4 << 20)
    assert after.max_bytes == 0
