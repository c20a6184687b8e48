"""One suite for every SuperBatchStore, the in-memory twin, Valkey and Redis: jobs, submitting and deciding."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress

import pytest

from jest_server.domain.errors import DeadLettered, JobUnknown, SuperBatchUnknown
from jest_server.domain.super_batches import Limits, SubmitResult, SubmitStatus, SuperBatchRef
from support.polling import wait_for, within
from support.super_batches import (
    REFERENCE,
    accounts,
    dead_letter,
    decision,
    result_of,
    spec,
    submission,
    submit,
    upload,
)

# Jobs


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


# Reference models


async def test_an_announcement_lasts_as_long_as_it_says(stores):
    assert await stores.jobs.get_reference("ref") is None
    await stores.jobs.announce_reference(REFERENCE, ttl_s=0.3)
    assert await stores.jobs.get_reference("ref") == REFERENCE

    async def forgotten():
        return await stores.jobs.get_reference("ref") is None

    with within(2):
        await wait_for(forgotten)


# Submitting


async def test_a_job_that_is_not_there_takes_nothing(stores):
    with pytest.raises(JobUnknown, match="'nobody'"):
        await submit(stores, "nobody")
    assert await stores.super_batches.get_super_batch(SuperBatchRef("nobody", "sb")) is None
    assert await accounts(stores, "nobody") == (0, 0, 0, 0)


async def test_step_and_group_labels_are_kept_with_the_super_batch(stores, job):
    await submit(stores, job, step=2**63, group_labels=("cat", ""))
    held = await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb"))
    assert held.step == held.submissions[0].step == 2**63
    assert held.submissions[0].group_labels == ("cat", "")


async def test_a_super_batch_may_have_no_step_no_labels_and_no_reference_model(stores, job):
    assert await submit(stores, job, reference=None) is SubmitStatus.ACCEPTED
    held = await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb"))
    assert held.step is held.reference is held.submissions[0].reference is None
    assert held.submissions[0].group_labels == ()
    recorded = await stores.decisions.decide(decision(job, reference=None), keep_s=60)
    assert recorded.reference is None


@pytest.mark.parametrize(("first", "second"), [(0, 1), (None, 0), (0, None)])
async def test_another_step_than_the_first_ranks_is_a_conflict_for_every_rank(stores, job, first, second):
    await submit(stores, job, rank=0, world_size=2, step=first)
    assert await submit(stores, job, rank=1, world_size=2, step=second) is SubmitStatus.CONFLICT
    assert await submit(stores, job, rank=0, world_size=2, step=second) is SubmitStatus.CONFLICT
    assert set((await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb"))).submissions) == {0}
    assert await submit(stores, job, rank=1, world_size=2, step=first) is SubmitStatus.ACCEPTED
    assert await accounts(stores, job) == (1, 0, 0, 1)


async def test_a_decisions_step_gain_and_weights_come_back_as_they_were(stores, job):
    await submit(stores, job, step=3)
    weights = {0: (1.25, 0.10000000149011612)}
    made = decision(job, step=3, gain=0.1, weights=weights)
    assert await stores.decisions.decide(made, keep_s=60) == made
    found = await stores.decisions.get_decision(SuperBatchRef(job, "sb"))
    assert (found.step, found.gain, found.weights) == (3, 0.1, weights)


async def test_the_first_rank_puts_the_super_batch_in_flight_and_pins_the_reference(stores, job):
    newer = REFERENCE.model_copy(update={"version": "2"})
    assert await submit(stores, job, world_size=2) is SubmitStatus.ACCEPTED
    assert await submit(stores, job, rank=1, world_size=2, reference=newer, keys=("c",)) is SubmitStatus.ACCEPTED
    held = await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb"))
    assert held.reference == REFERENCE
    assert held.world_size == 2
    assert {rank: s.keys for rank, s in held.submissions.items()} == {0: ("a", "b"), 1: ("c",)}
    assert held.submissions[1].reference == REFERENCE
    assert await accounts(stores, job) == (1, 0, 0, 1)


async def test_a_later_rank_learns_the_pinned_reference_and_step(stores, job):
    newer = REFERENCE.model_copy(update={"version": "2"})
    limits = Limits()
    results = [
        await stores.super_batches.submit(
            submission(job, rank=rank, world_size=3, reference=reference, step=step),
            limits=limits,
            ttl_s=60.0,
            now_s=time.time(),
        )
        for rank, reference, step in ((0, REFERENCE, 2**63), (1, newer, 2**63), (2, newer, 5))
    ]
    assert results == [
        SubmitResult(SubmitStatus.ACCEPTED, REFERENCE, 2**63),
        SubmitResult(SubmitStatus.ACCEPTED, REFERENCE, 2**63),
        SubmitResult(SubmitStatus.CONFLICT, REFERENCE, 2**63),
    ]


async def test_a_repeated_submission_learns_which_of_its_own_rows_were_uploaded(stores, job):
    repeated = {"limits": Limits(), "ttl_s": 60.0, "now_s": time.time()}
    own, other = (submission(job, rank=rank, world_size=2, keys=("a", "b", "c")) for rank in (0, 1))
    for each in (own, other):
        await stores.super_batches.submit(each, **repeated)
    for rank, digest, positions in ((0, "u", (0,)), (0, "v", (2,)), (1, "w", (1,))):
        upload = {"digest": digest, "positions": positions, "shards": [], "limits": Limits()}
        await stores.super_batches.add_upload(own.ref, rank, **upload)
    assert await stores.super_batches.submit(own, **repeated) == SubmitResult(
        SubmitStatus.REPEATED, REFERENCE, uploaded=frozenset({0, 2})
    )


async def test_row_counts_are_those_of_the_ranks_that_have_submitted(stores, job):
    ref = SuperBatchRef(job, "sb")
    assert await stores.super_batches.row_counts(ref, range(3)) == {}
    await submit(stores, job, rank=0, world_size=3, keys=("a", "b"))
    await submit(stores, job, rank=2, world_size=3, keys=("c",))
    assert await stores.super_batches.row_counts(ref, range(3)) == {0: 2, 2: 1}
    assert await stores.super_batches.row_counts(ref, [1, 2]) == {2: 1}
    assert await stores.super_batches.row_counts(ref, []) == {}
    await stores.decisions.decide(decision(job), keep_s=60)
    assert await stores.super_batches.row_counts(ref, range(3)) == {}


async def test_repeating_a_submission_changes_nothing(stores, job):
    await submit(stores, job)
    assert await submit(stores, job) is SubmitStatus.REPEATED
    assert await accounts(stores, job) == (1, 0, 0, 1)


@pytest.mark.parametrize("other", [{"digest": "e"}, {"world_size": 2}])
async def test_the_same_id_with_other_content_is_a_conflict(stores, job, other):
    await submit(stores, job)
    assert await submit(stores, job, **other) is SubmitStatus.CONFLICT
    assert (await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb"))).submissions[0].digest == "d"


async def test_more_than_the_job_allows_is_not_stored(stores, job):
    for i in range(3):
        await submit(stores, job, f"sb-{i}", max_in_flight=3)
    assert await submit(stores, job, "sb-3", max_in_flight=3) is SubmitStatus.JOB_FULL
    assert await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb-3")) is None
    assert await submit(stores, job, "sb-2", max_in_flight=3) is SubmitStatus.REPEATED
    await stores.decisions.decide(decision(job, "sb-0"), keep_s=60)
    assert await submit(stores, job, "sb-3", max_in_flight=3) is SubmitStatus.ACCEPTED


async def test_the_limit_holds_when_many_submit_at_once(stores, job):
    answers = await asyncio.gather(*(submit(stores, job, f"sb-{i}", max_in_flight=5) for i in range(20)))
    assert answers.count(SubmitStatus.ACCEPTED) == 5
    assert await accounts(stores, job) == (5, 0, 0, 5)


async def test_what_is_decided_or_dead_says_so(stores, job):
    await submit(stores, job, "decided")
    await stores.decisions.decide(decision(job, "decided"), keep_s=60)
    await submit(stores, job, "dead")
    await stores.decisions.dead_letter(dead_letter(job, "dead"))
    assert await submit(stores, job, "decided") is SubmitStatus.DECIDED
    assert await submit(stores, job, "dead") is SubmitStatus.DEAD
    assert await accounts(stores, job) == (2, 1, 1, 0)


# Deciding


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


async def test_only_the_newest_letters_are_kept(stores, job):
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
