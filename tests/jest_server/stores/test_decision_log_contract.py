"""Every DecisionLog: decisions, dead letters, deadlines, replaced reference models, and requeueing."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress

import pytest

from jest_server.domain.dead_letters import RequeueStatus
from jest_server.domain.errors import DeadLettered, SuperBatchUnknown
from jest_server.domain.super_batches import Limits, SubmitStatus, SuperBatchRef, UploadStatus
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

NEWER = REFERENCE.model_copy(update={"version": "2"})


async def requeue(stores, job, super_batch_id="sb", *, reference=REFERENCE, now_s=None, limits=None):
    now_s = time.time() if now_s is None else now_s
    return await stores.decisions.requeue(
        SuperBatchRef(job, super_batch_id), reference, limits=limits or Limits(), ttl_s=60.0, now_s=now_s
    )


async def dead_lettered(stores, job, super_batch_id="sb", **fields):
    """Submits, uploads and dead-letters a super-batch."""
    await submit(stores, job, super_batch_id, **fields)
    await upload(stores, job, super_batch_id)
    await stores.decisions.dead_letter(dead_letter(job, super_batch_id))


async def test_the_first_decision_stands(stores, job):
    await submit(stores, job)
    first = decision(job)
    assert await stores.decisions.decide(first, keep_s=60) == first
    assert await stores.decisions.decide(decision(job, seed=8), keep_s=60) == first
    assert await stores.decisions.get_decision(SuperBatchRef(job, "sb")) == first
    assert await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb")) is None
    counters = await stores.jobs.counters(job)
    assert (counters.selected, counters.examples_loaded, counters.examples_selected) == (1, 10, 2)
    assert (counters.cache_hits, counters.reference_inferences, counters.fallbacks) == (6, 4, 0)


async def test_of_many_who_decide_at_once_one_does(stores, job):
    await submit(stores, job)
    answers = await asyncio.gather(*(stores.decisions.decide(decision(job, seed=i), keep_s=60) for i in range(20)))
    assert len({answer.seed for answer in answers}) == 1
    assert await accounts(stores, job) == (1, 1, 0, 0)


async def test_a_fallback_is_counted(stores, job):
    await submit(stores, job)
    await stores.decisions.decide(decision(job, fallback="uniform", fallback_reason="late"), keep_s=60)
    assert (await stores.jobs.counters(job)).fallbacks == 1


async def test_a_decision_is_kept_as_long_as_asked(stores, job):
    await submit(stores, job)
    await stores.decisions.decide(decision(job), keep_s=0.2)

    async def forgotten():
        return await stores.decisions.get_decision(SuperBatchRef(job, "sb")) is None

    with within(2):
        await wait_for(forgotten)
    with pytest.raises(SuperBatchUnknown):
        await stores.decisions.decide(decision(job), keep_s=60)
    assert await accounts(stores, job) == (1, 1, 0, 0)


async def test_what_is_dead_or_was_never_submitted_cannot_be_decided(stores, job):
    with pytest.raises(SuperBatchUnknown):
        await stores.decisions.decide(decision(job), keep_s=60)
    await submit(stores, job)
    await stores.decisions.dead_letter(dead_letter(job))
    with pytest.raises(DeadLettered):
        await stores.decisions.decide(decision(job), keep_s=60)
    assert await accounts(stores, job) == (1, 0, 1, 0)


async def test_a_dead_letter_is_written_once_and_found(stores, job):
    await submit(stores, job)
    assert await stores.decisions.dead_letter(dead_letter(job))
    assert not await stores.decisions.dead_letter(dead_letter(job, at_s=9.0))
    assert await stores.decisions.get_dead_letter(SuperBatchRef(job, "sb")) == dead_letter(job)
    assert await stores.decisions.get_dead_letter(SuperBatchRef(job, "other")) is None


async def test_dead_letters_are_listed_newest_first(stores, job):
    for i in range(3):
        await submit(stores, job, f"sb-{i}")
        await stores.decisions.dead_letter(dead_letter(job, f"sb-{i}", at_s=float(i)))
    assert [found.super_batch_id for found in await stores.decisions.list_dead_letters(job, limit=2)] == [
        "sb-2",
        "sb-1",
    ]


async def test_only_what_is_overdue_expires(stores, job):
    await submit(stores, job, "late", ttl_s=1, now_s=100.0)
    await submit(stores, job, "fine", ttl_s=1, now_s=time.time())
    letters = [found for found in await stores.decisions.dead_letter_overdue(now_s=200.0) if found.job == job]
    assert [(found.super_batch_id, found.reason) for found in letters] == [("late", "EXPIRED")]
    assert await accounts(stores, job) == (2, 0, 1, 1)


async def test_the_deadline_is_the_first_ranks_time_to_live_from_its_call(stores, job):
    await submit(stores, job, world_size=2, ttl_s=10, now_s=100.0)
    await submit(stores, job, rank=1, world_size=2, ttl_s=10, now_s=105.0)
    assert await stores.decisions.dead_letter_overdue(now_s=109.9) == []
    assert len(await stores.decisions.dead_letter_overdue(now_s=110.0)) == 1


async def test_however_many_are_overdue_all_expire(stores, job):
    for i in range(230):
        await submit(stores, job, f"sb-{i}", max_in_flight=1000, now_s=100.0)
    sweeps = await asyncio.gather(*(stores.decisions.dead_letter_overdue(now_s=200.0) for _ in range(3)))
    expired = [found.super_batch_id for letters in sweeps for found in letters]
    assert sorted(expired) == sorted(f"sb-{i}" for i in range(230))
    assert await accounts(stores, job) == (230, 0, 230, 0)


async def test_only_the_newest_dead_letters_are_kept(stores, job):
    for i in range(1005):
        await submit(stores, job, f"sb-{i:04d}")
        await stores.decisions.dead_letter(dead_letter(job, f"sb-{i:04d}", at_s=float(i)))
    letters = await stores.decisions.list_dead_letters(job, limit=5000)
    assert [found.super_batch_id for found in letters] == [f"sb-{i:04d}" for i in range(1004, 4, -1)]
    assert await stores.decisions.get_dead_letter(SuperBatchRef(job, "sb-0004")) is None
    assert await accounts(stores, job) == (1005, 0, 1005, 0)


async def test_accounts_balance_whatever_many_do_at_once(stores, job):
    """Random operations on few super-batches by concurrent callers, the balance checked between any two."""
    dice = random.Random(14)

    async def score(_):
        for claim in await stores.queue.claim(str(dice.random()), REFERENCE, count=2, block_s=0.001):
            await stores.queue.complete(claim, result_of(claim))

    async def decide(super_batch_id):
        with suppress(DeadLettered, SuperBatchUnknown):
            await stores.decisions.decide(decision(job, super_batch_id), keep_s=60)

    operations = [
        lambda sb: submit(stores, job, sb, max_in_flight=4, ttl_s=dice.choice([0.0, 60.0])),
        lambda sb: submit(stores, job, sb, max_in_flight=4),
        lambda sb: upload(stores, job, sb),
        score,
        decide,
        lambda sb: stores.decisions.dead_letter(dead_letter(job, sb)),
        lambda _: stores.decisions.dead_letter_overdue(now_s=time.time()),
    ]

    async def act():
        for _ in range(25):
            await dice.choice(operations)(f"sb-{dice.randrange(12)}")
            await accounts(stores, job)

    await asyncio.gather(*(act() for _ in range(8)))
    submitted, selected, dead, in_flight = await accounts(stores, job)
    assert submitted == selected + dead + in_flight
    assert submitted > 0


async def test_a_decisions_step_gain_and_weights_come_back_as_they_were(stores, job):
    await submit(stores, job, step=3)
    weights = {0: (1.25, 0.10000000149011612)}
    made = decision(job, step=3, gain=0.1, weights=weights)
    assert await stores.decisions.decide(made, keep_s=60) == made
    found = await stores.decisions.get_decision(SuperBatchRef(job, "sb"))
    assert (found.step, found.gain, found.weights) == (3, 0.1, weights)


async def test_of_many_decisions_the_newest_are_kept(stores, job):
    for number in range(5):
        await submit(stores, job, f"sb-{number}")
        await stores.decisions.decide(decision(job, f"sb-{number}"), keep_s=60 + number, keep_count=2)
    found = [await stores.decisions.get_decision(SuperBatchRef(job, f"sb-{number}")) is not None for number in range(5)]
    assert found == [False, False, False, True, True]
    assert (await stores.jobs.counters(job)).selected == 5


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


async def test_a_requeued_super_batch_is_in_flight_with_the_rows_it_had_and_no_uploads(stores, job):
    await dead_lettered(stores, job, world_size=2, step=7, keys=("x", "y"))
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
    await dead_lettered(stores, job)
    await requeue(stores, job)
    assert await submit(stores, job) is SubmitStatus.REPEATED
    assert await submit(stores, job, digest="other") is SubmitStatus.CONFLICT
    assert await upload(stores, job) is UploadStatus.ACCEPTED
    (claim,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=0)
    await stores.queue.complete(claim, result_of(claim))
    await stores.decisions.decide(decision(job), keep_s=60)
    assert await accounts(stores, job) == (1, 1, 0, 0)


async def test_a_requeued_super_batch_has_a_deadline_of_its_own(stores, job):
    await dead_lettered(stores, job)
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
    await dead_lettered(stores, "red~job")
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


async def test_a_dropped_dead_letter_is_forgotten_and_still_counted(stores, job):
    await dead_lettered(stores, job)
    assert await stores.decisions.drop_dead_letter(SuperBatchRef(job, "sb"))
    assert not await stores.decisions.drop_dead_letter(SuperBatchRef(job, "sb"))
    assert not await stores.decisions.drop_dead_letter(SuperBatchRef("nobody", "sb"))
    assert await stores.decisions.list_dead_letters(job, limit=9) == []
    assert await requeue(stores, job) is RequeueStatus.NO_LETTER
    assert await accounts(stores, job) == (1, 0, 1, 0)
    assert await submit(stores, job, digest="anew") is SubmitStatus.ACCEPTED
    assert await accounts(stores, job) == (2, 0, 1, 1)


async def test_no_kept_inputs_outlive_their_job(stores, job):
    await dead_lettered(stores, job)
    await stores.jobs.delete_job(job)
    await stores.jobs.create_job(spec(job), now_s=1.0)
    assert await requeue(stores, job) is RequeueStatus.NO_LETTER


async def test_what_waits_for_a_version_that_was_replaced_is_dead_lettered(stores, job):
    for super_batch_id in ("waits", "taken"):
        await submit(stores, job, super_batch_id)
        await upload(stores, job, super_batch_id)
    (claim,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=0)
    await stores.jobs.announce_reference(REFERENCE, ttl_s=0.1)
    await stores.jobs.announce_reference(NEWER, ttl_s=60)
    await submit(stores, job, "newer", reference=NEWER)
    await upload(stores, job, "newer", version="2")
    assert await stores.decisions.dead_letter_unserved(grace_s=0.0, now_s=7.0) == []
    await asyncio.sleep(0.3)
    assert await stores.decisions.dead_letter_unserved(grace_s=60.0, now_s=7.0) == []
    letters = await stores.decisions.dead_letter_unserved(grace_s=0.1, now_s=7.0)
    assert sorted(letter.super_batch_id for letter in letters) == ["taken", "waits"]
    assert {letter.reason for letter in letters} == {"REFERENCE_CHANGED"}
    assert "'ref' is not served in version '1' any more, but in ['2']" in letters[0].detail
    await stores.queue.complete(claim, result_of(claim))
    assert await stores.queue.depth() == 1
    assert await stores.decisions.dead_letter_unserved(grace_s=0.1, now_s=7.0) == []


async def test_nothing_is_dead_lettered_while_no_version_is_served(stores, job):
    """The reference model being away is not the super-batches' fault."""
    await submit(stores, job)
    await upload(stores, job)
    await stores.jobs.announce_reference(REFERENCE, ttl_s=0.05)
    await asyncio.sleep(0.2)
    assert await stores.decisions.dead_letter_unserved(grace_s=0.0, now_s=7.0) == []
