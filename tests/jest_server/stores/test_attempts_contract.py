"""Attempts of a job, as every kind of store keeps them: which process belongs to which."""

from __future__ import annotations

import pytest

from jest_server.domain.attempts import AttemptRequest, OpenStatus
from jest_server.domain.errors import AttemptSuperseded, AttemptUnknown, JobUnknown
from jest_server.domain.super_batches import SubmitStatus, SuperBatchRef
from support.super_batches import accounts, decision, submit

OPENED, JOINED, SUPERSEDED = OpenStatus.OPENED, OpenStatus.JOINED, OpenStatus.SUPERSEDED


async def opened(stores, job, process, rank=0, *, world_size=1, launch="", parent="", parent_step=None):
    request = AttemptRequest(job, rank, world_size, launch, process, parent, parent_step)
    result = await stores.jobs.open_attempt(request)
    return result.status, result.attempt


async def decide(stores, job, super_batch_id):
    assert await submit(stores, job, super_batch_id) is SubmitStatus.ACCEPTED
    await stores.decisions.decide(decision(job, super_batch_id), keep_s=60)


async def test_every_start_is_an_attempt_of_its_own_and_a_repeated_call_changes_nothing(stores, job):
    assert await opened(stores, job, "p1") == (OPENED, "a1")
    assert await opened(stores, job, "p1") == (JOINED, "a1")
    assert await opened(stores, job, "p2") == (OPENED, "a2")
    assert await opened(stores, job, "p2") == (JOINED, "a2")


async def test_without_a_launch_an_attempt_takes_one_process_of_each_rank(stores, job):
    for start, attempt in ((1, "a1"), (2, "a2")):
        statuses = [await opened(stores, job, f"{start}-{rank}", rank, world_size=3) for rank in (2, 0, 1)]
        assert statuses == [(OPENED, attempt), (JOINED, attempt), (JOINED, attempt)]


async def test_with_a_launch_all_its_calls_share_an_attempt_whatever_comes_back(stores, job):
    assert await opened(stores, job, "p0", 0, world_size=2, launch="monday") == (OPENED, "a1")
    assert await opened(stores, job, "p1", 1, world_size=2, launch="monday") == (JOINED, "a1")
    assert await opened(stores, job, "p2", 0, world_size=2, launch="monday") == (JOINED, "a1")
    assert await opened(stores, job, "p3", 0, world_size=2, launch="tuesday") == (OPENED, "a2")
    assert await opened(stores, job, "p4", 1, world_size=2, launch="monday") == (SUPERSEDED, "a2")


async def test_a_process_of_an_attempt_that_decided_something_is_superseded_by_a_newer_one(stores, job):
    await opened(stores, job, "old")
    await decide(stores, job, "a1-0-0")
    assert await opened(stores, job, "new") == (OPENED, "a2")
    assert await opened(stores, job, "old") == (SUPERSEDED, "a2")
    with pytest.raises(AttemptSuperseded, match="newer process of rank 0 opened attempt 'a2'"):
        await submit(stores, job, "a1-0-1")
    assert await submit(stores, job, "a1-0-0") is SubmitStatus.DECIDED, "what was decided stays the answer"


async def test_ranks_that_are_started_one_by_one_find_together_though_others_died_meanwhile(stores, job):
    """Rank 1 of the first start joins and dies; the second start's rank 0 is put together with it at first."""
    assert await opened(stores, job, "first-1", 1, world_size=2) == (OPENED, "a1")
    assert await opened(stores, job, "second-0", 0, world_size=2) == (JOINED, "a1")
    assert await opened(stores, job, "second-1", 1, world_size=2) == (OPENED, "a2")
    with pytest.raises(AttemptSuperseded):
        await submit(stores, job, "a1-0-0", rank=0, world_size=2)
    assert await opened(stores, job, "second-0", 0, world_size=2) == (JOINED, "a2")
    assert await submit(stores, job, "a2-0-0", rank=0, world_size=2) is SubmitStatus.ACCEPTED


async def test_a_rank_that_starts_again_before_all_have_joined_takes_its_old_place(stores, job):
    await opened(stores, job, "p0", 0, world_size=2)
    assert await opened(stores, job, "p0-again", 0, world_size=2) == (JOINED, "a1")
    assert await opened(stores, job, "p0", 0, world_size=2) == (SUPERSEDED, "a1")
    assert await opened(stores, job, "p1", 1, world_size=2) == (JOINED, "a1")


async def test_an_attempt_continues_only_one_that_exists(stores, job):
    assert (await opened(stores, job, "p1", parent="a1", parent_step=7))[0] is OpenStatus.UNKNOWN_PARENT
    assert await opened(stores, job, "p2") == (OPENED, "a1")
    assert await opened(stores, job, "p3", parent="a1", parent_step=7) == (OPENED, "a2")


async def test_another_parent_or_world_size_under_one_launch_is_a_mismatch(stores, job):
    await opened(stores, job, "p0", 0, world_size=2, launch="x")
    assert (await opened(stores, job, "p1", 1, world_size=3, launch="x"))[0] is OpenStatus.MISMATCH
    request = AttemptRequest(job, 1, 2, "x", "p2", "a1", 5)
    result = await stores.jobs.open_attempt(request)
    assert (result.status, result.origin) == (OpenStatus.MISMATCH, (2, "", None))


async def test_an_attempt_that_was_never_opened_takes_no_super_batch(stores, job):
    with pytest.raises(AttemptUnknown, match="'a1'"):
        await submit(stores, job, "a1-0-0")
    assert await submit(stores, job, "an-id-of-no-attempt") is SubmitStatus.ACCEPTED


async def test_what_earlier_attempts_left_in_flight_is_dead_lettered_and_nothing_else(stores, job):
    await opened(stores, job, "p1")
    await decide(stores, job, "a1-0-0")
    await submit(stores, job, "a1-0-1")
    await submit(stores, job, "other")
    await opened(stores, job, "p2")
    await submit(stores, job, "a2-0-1")
    letters = await stores.decisions.dead_letter_superseded(job, 2, now_s=9.0)
    assert [(letter.ref, letter.reason) for letter in letters] == [(SuperBatchRef(job, "a1-0-1"), "SUPERSEDED")]
    assert await stores.decisions.dead_letter_superseded(job, 2, now_s=9.0) == []
    assert await accounts(stores, job) == (4, 1, 1, 2)


async def test_a_deleted_job_has_no_attempts(stores, job):
    await opened(stores, job, "p1")
    await stores.jobs.delete_job(job)
    with pytest.raises(JobUnknown):
        await opened(stores, job, "p1")
