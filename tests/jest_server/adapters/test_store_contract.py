"""One suite for every SuperBatchStore: the in-memory twin, Valkey, and Redis where it is installed."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from contextlib import suppress

import pytest

from jest_server.adapters.memory_store import MemorySuperBatchStore
from jest_server.adapters.redis_store import RedisSuperBatchStore
from jest_server.errors import DeadLettered, JobUnknown, SuperBatchUnknown
from jest_server.model import SubmitStatus, UploadStatus
from support.servers import queue_kinds, queue_server_of
from support.super_batches import (
    REFERENCE,
    accounts,
    decision,
    key_prefix,
    letter,
    result_of,
    shard,
    spec,
    submit,
    upload,
)


@pytest.fixture(scope="module", params=["memory", *queue_kinds()])
def store_url(request, tmp_path_factory):
    if request.param == "memory":
        yield None
        return
    with queue_server_of(request.param, tmp_path_factory.mktemp("store")) as server:
        yield f"{server.url}/0"


@pytest.fixture
async def store(store_url):
    in_memory = store_url is None
    store = MemorySuperBatchStore() if in_memory else RedisSuperBatchStore.from_url(store_url, prefix=key_prefix())
    yield store
    await store.close()


@pytest.fixture
async def job(store):
    await store.create_job(spec("job"), now_s=1.0)
    return "job"


async def wait_for(condition, timeout_s=5.0):
    """Polls an async condition until it holds, and returns what it gave."""
    async with asyncio.timeout(timeout_s):
        while not (found := await condition()):
            await asyncio.sleep(0.01)
    return found


# Jobs


async def test_a_job_is_registered_once_and_stays_what_it_was(store):
    name = f"job-{uuid.uuid4().hex}"
    first, created = await store.create_job(spec(name, seed=1), now_s=1.0)
    again, created_again = await store.create_job(spec(name, seed=2), now_s=2.0)
    assert (created, created_again) == (True, False)
    assert again == first == await store.get_job(name)
    assert (first.spec.seed, first.created_at_s) == (1, 1.0)


async def test_of_many_who_create_a_job_at_once_one_does(store):
    name = f"job-{uuid.uuid4().hex}"
    answers = await asyncio.gather(*(store.create_job(spec(name, seed=i), now_s=1.0) for i in range(20)))
    assert sum(created for _, created in answers) == 1
    assert len({job.spec.seed for job, _ in answers}) == 1


async def test_jobs_are_listed_in_order_from_a_name_on(store):
    for name in "cab":
        await store.create_job(spec(name), now_s=1.0)
    assert [job.spec.name for job in await store.list_jobs(after="", limit=2)] == ["a", "b"]
    assert [job.spec.name for job in await store.list_jobs(after="b", limit=2)] == ["c"]
    assert await store.list_jobs(after="", limit=0) == []


async def test_a_deleted_job_leaves_nothing(store, job):
    await submit(store, job)
    await upload(store, job)
    await submit(store, job, "decided")
    await store.decide(decision(job, "decided"), keep_s=60)
    await submit(store, job, "dead")
    await store.dead_letter(letter(job, "dead"))
    assert await store.delete_job(job)
    assert not await store.delete_job(job)
    assert await store.get_job(job) is None
    assert await store.get_super_batch(job, "sb") is None
    assert await store.get_decision(job, "decided") is None
    assert await store.list_dead_letters(job, limit=10) == []
    assert await accounts(store, job) == (0, 0, 0, 0)
    assert await store.queue_depth() == 0
    assert await store.claim("c", count=1, block_s=0.05) == []


async def test_a_job_of_a_deleted_ones_name_starts_from_nothing(store, job):
    await submit(store, job)
    await upload(store, job)
    (stale,) = await store.claim("c", count=1, block_s=1)
    await store.delete_job(job)
    assert (await store.create_job(spec(job, seed=5), now_s=2.0))[1]
    await store.complete(stale, result_of(stale))
    await store.release("c", [stale])
    assert await submit(store, job, digest="other") is SubmitStatus.ACCEPTED
    assert await store.get_results(job, "sb") == []
    assert (await store.get_super_batch(job, "sb")).pending_shards == 0
    assert await accounts(store, job) == (1, 0, 0, 1)
    assert await store.queue_depth() == 0


async def test_deleting_a_job_leaves_others_alone(store, job):
    await store.create_job(spec("job-2"), now_s=1.0)
    for name in (job, "job-2"):
        await submit(store, name)
        await upload(store, name)
    await store.delete_job(job)
    assert await accounts(store, "job-2") == (1, 0, 0, 1)
    (claim,) = await store.claim("c", count=5, block_s=1)
    assert claim.shard.job == "job-2"


# Reference models


async def test_an_announcement_lasts_as_long_as_it_says(store):
    assert await store.get_reference("ref") is None
    await store.announce_reference(REFERENCE, ttl_s=0.3)
    assert await store.get_reference("ref") == REFERENCE

    async def forgotten():
        return await store.get_reference("ref") is None

    await wait_for(forgotten, timeout_s=2)


# Submitting


async def test_a_job_that_is_not_there_takes_nothing(store):
    with pytest.raises(JobUnknown, match="'nobody'"):
        await submit(store, "nobody")
    assert await store.get_super_batch("nobody", "sb") is None
    assert await accounts(store, "nobody") == (0, 0, 0, 0)


async def test_the_first_rank_puts_the_super_batch_in_flight_and_pins_the_reference(store, job):
    newer = REFERENCE.model_copy(update={"version": "2"})
    assert await submit(store, job, world_size=2) is SubmitStatus.ACCEPTED
    assert await submit(store, job, rank=1, world_size=2, reference=newer, keys=("c",)) is SubmitStatus.ACCEPTED
    held = await store.get_super_batch(job, "sb")
    assert held.reference == REFERENCE
    assert held.world_size == 2
    assert {rank: s.keys for rank, s in held.submissions.items()} == {0: ("a", "b"), 1: ("c",)}
    assert held.submissions[1].reference == REFERENCE
    assert await accounts(store, job) == (1, 0, 0, 1)


async def test_repeating_a_submission_changes_nothing(store, job):
    await submit(store, job)
    assert await submit(store, job) is SubmitStatus.REPEATED
    assert await accounts(store, job) == (1, 0, 0, 1)


@pytest.mark.parametrize("other", [{"digest": "e"}, {"world_size": 2}])
async def test_the_same_id_with_other_content_is_a_conflict(store, job, other):
    await submit(store, job)
    assert await submit(store, job, **other) is SubmitStatus.CONFLICT
    assert (await store.get_super_batch(job, "sb")).submissions[0].digest == "d"


async def test_more_than_the_job_allows_is_not_stored(store, job):
    for i in range(3):
        await submit(store, job, f"sb-{i}", max_in_flight=3)
    assert await submit(store, job, "sb-3", max_in_flight=3) is SubmitStatus.QUEUE_FULL
    assert await store.get_super_batch(job, "sb-3") is None
    assert await submit(store, job, "sb-2", max_in_flight=3) is SubmitStatus.REPEATED
    await store.decide(decision(job, "sb-0"), keep_s=60)
    assert await submit(store, job, "sb-3", max_in_flight=3) is SubmitStatus.ACCEPTED


async def test_the_limit_holds_when_many_submit_at_once(store, job):
    answers = await asyncio.gather(*(submit(store, job, f"sb-{i}", max_in_flight=5) for i in range(20)))
    assert answers.count(SubmitStatus.ACCEPTED) == 5
    assert await accounts(store, job) == (5, 0, 0, 5)


async def test_what_is_decided_or_dead_says_so(store, job):
    await submit(store, job, "decided")
    await store.decide(decision(job, "decided"), keep_s=60)
    await submit(store, job, "dead")
    await store.dead_letter(letter(job, "dead"))
    assert await submit(store, job, "decided") is SubmitStatus.DECIDED
    assert await submit(store, job, "dead") is SubmitStatus.DEAD
    assert await accounts(store, job) == (2, 1, 1, 0)


# Uploading and scoring


async def test_an_upload_is_queued_whole_and_once(store, job):
    await submit(store, job)
    assert await upload(store, job, shards=3) is UploadStatus.ACCEPTED
    assert await upload(store, job, shards=3) is UploadStatus.REPEATED
    held = await store.get_super_batch(job, "sb")
    assert held.pending_shards == 3
    assert held.uploads == {0: {"u": (0, 1)}}
    claims = await store.claim("c", count=10, block_s=0.1)
    assert [claim.shard for claim in claims] == [shard(job, number=i) for i in range(3)]
    assert {claim.deliveries for claim in claims} == {1}


async def test_of_many_same_uploads_at_once_one_is_queued(store, job):
    await submit(store, job)
    answers = await asyncio.gather(*(upload(store, job, shards=2) for _ in range(8)))
    assert sorted(answer.value for answer in answers) == ["accepted"] + ["repeated"] * 7
    assert await store.queue_depth() == 2
    assert len(await store.claim("c", count=9, block_s=1)) == 2


async def test_another_upload_of_the_same_rank_is_queued_beside_the_first(store, job):
    await submit(store, job)
    await upload(store, job, digest="u")
    assert await upload(store, job, digest="v") is UploadStatus.ACCEPTED
    held = await store.get_super_batch(job, "sb")
    assert (set(held.uploads[0]), held.pending_shards) == ({"u", "v"}, 2)


async def test_an_upload_without_shards_is_remembered(store, job):
    await submit(store, job)
    assert await upload(store, job, shards=0) is UploadStatus.ACCEPTED
    assert await upload(store, job, shards=0) is UploadStatus.REPEATED
    assert await store.queue_depth() == 0


async def test_an_upload_for_nothing_in_flight_is_gone(store, job):
    assert await upload(store, job) is UploadStatus.GONE
    assert await store.claim("c", count=1, block_s=0.05) == []


async def test_every_listener_hears_of_a_result_that_is_there_already(store, job):
    heard = [asyncio.Event(), asyncio.Event()]

    async def listen(event):
        async for news in store.news():
            if news.super_batch_id == "sb":
                assert len(await store.get_results(job, "sb")) == 1
                event.set()

    listeners = [asyncio.create_task(listen(event)) for event in heard]
    await asyncio.sleep(0.1)  # news are for those who listen: both have to have begun
    await submit(store, job)
    await upload(store, job)
    (claim,) = await store.claim("c", count=1, block_s=1)
    await store.complete(claim, result_of(claim))
    async with asyncio.timeout(5):
        await asyncio.gather(*(event.wait() for event in heard))
    for listener in listeners:
        listener.cancel()
    await asyncio.gather(*listeners, return_exceptions=True)
    assert await store.get_results(job, "sb") == [result_of(claim)]
    assert (await store.get_super_batch(job, "sb")).pending_shards == 0


async def test_whatever_ends_a_super_batch_is_news(store, job):
    await store.create_job(spec("other"), now_s=1.0)
    for name, super_batch_id in ((job, "decided"), (job, "dead"), (job, "late"), ("other", "deleted")):
        await submit(store, name, super_batch_id, now_s=100.0 if super_batch_id == "late" else None)
    heard = set()

    async def listen():
        async for news in store.news():
            heard.add(news.super_batch_id)

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0.1)  # as above
    await store.decide(decision(job, "decided"), keep_s=60)
    await store.dead_letter(letter(job, "dead"))
    await store.dead_letter_overdue(now_s=200.0)
    await store.delete_job("other")

    async def all_heard():
        return heard == {"decided", "dead", "late", "deleted"}

    await wait_for(all_heard)
    listener.cancel()
    await asyncio.gather(listener, return_exceptions=True)


async def test_completing_twice_counts_once(store, job):
    await submit(store, job)
    await upload(store, job, shards=2)
    claim, _ = await store.claim("c", count=2, block_s=1)
    await store.complete(claim, result_of(claim, inferred=2))
    await store.complete(claim, result_of(claim, inferred=0))
    assert [result.inferred for result in await store.get_results(job, "sb")] == [2]
    assert (await store.get_super_batch(job, "sb")).pending_shards == 1


async def test_who_waits_for_a_shard_gets_it_when_it_comes(store, job):
    waiting = asyncio.create_task(store.claim("c", count=1, block_s=5))
    await asyncio.sleep(0.05)
    await submit(store, job)
    await upload(store, job)
    started = time.monotonic()
    assert len(await waiting) == 1
    assert time.monotonic() - started < 1


async def test_who_waits_in_vain_is_told_in_time(store):
    started = time.monotonic()
    assert await store.claim("c", count=1, block_s=0.2) == []
    assert 0.19 < time.monotonic() - started < 1.5
    assert await store.claim("c", count=1, block_s=0) == []


async def test_many_consumers_share_the_shards_out(store, job):
    await submit(store, job)
    await upload(store, job, shards=30)
    taken = await asyncio.gather(*(store.claim(f"c{i}", count=3, block_s=0.2) for i in range(12)))
    shard_ids = [claim.shard.shard_id for claims in taken for claim in claims]
    assert len(shard_ids) == len(set(shard_ids)) == 30


async def test_a_claimed_shard_is_nobody_elses(store, job):
    await submit(store, job)
    await upload(store, job)
    assert len(await store.claim("one", count=5, block_s=1)) == 1
    assert await store.claim("two", count=5, block_s=0.05) == []
    assert await store.reclaim("two", idle_s=60, count=5) == []


async def test_a_claim_left_alone_is_taken_over_with_one_more_delivery(store, job):
    await submit(store, job)
    await upload(store, job)
    (claim,) = await store.claim("one", count=1, block_s=1)
    await asyncio.sleep(0.15)
    (taken,) = await store.reclaim("two", idle_s=0.1, count=5)
    assert (taken.shard, taken.deliveries) == (claim.shard, 2)
    assert await store.reclaim("three", idle_s=0.1, count=5) == []


async def test_an_abandoned_claim_is_found_behind_many_that_are_kept(store, job):
    await submit(store, job)
    await upload(store, job, shards=40)
    kept = await store.claim("alive", count=39, block_s=1)
    (left,) = await store.claim("dead", count=1, block_s=1)
    await asyncio.sleep(0.35)
    await store.keep("alive", kept)
    assert [claim.shard for claim in await store.reclaim("heir", idle_s=0.3, count=1)] == [left.shard]


async def test_no_more_is_taken_over_than_asked(store, job):
    await submit(store, job)
    await upload(store, job, shards=30)
    assert len(await store.claim("dead", count=30, block_s=1)) == 30
    await asyncio.sleep(0.02)
    taken = await store.reclaim("heir", idle_s=0.01, count=25)
    assert [claim.shard.shard_id for claim in taken] == [f"0-u-{i}" for i in range(25)]
    assert {claim.deliveries for claim in taken} == {2}


async def test_of_many_who_take_over_one_does(store, job):
    await submit(store, job)
    await upload(store, job)
    await store.claim("dead", count=1, block_s=1)
    await asyncio.sleep(0.25)
    taken = await asyncio.gather(*(store.reclaim(f"c{i}", idle_s=0.2, count=1) for i in range(10)))
    assert sum(map(len, taken)) == 1


async def test_a_kept_claim_is_not_taken_over(store, job):
    await submit(store, job)
    await upload(store, job)
    claims = await store.claim("one", count=1, block_s=1)
    for _ in range(4):
        await asyncio.sleep(0.1)
        await store.keep("one", claims)
    assert await store.reclaim("two", idle_s=0.3, count=1) == []


async def test_who_lost_a_claim_cannot_keep_or_release_it(store, job):
    await submit(store, job)
    await upload(store, job)
    claims = await store.claim("one", count=1, block_s=1)
    await asyncio.sleep(0.1)
    assert len(await store.reclaim("two", idle_s=0.05, count=1)) == 1
    await store.keep("one", claims)
    await store.release("one", claims)
    assert await store.claim("one", count=1, block_s=0.05) == []


async def test_a_released_shard_is_taken_at_once_and_counts_no_delivery(store, job):
    await submit(store, job)
    await upload(store, job)
    await store.release("one", await store.claim("one", count=1, block_s=1))
    (claim,) = await store.claim("two", count=1, block_s=1)
    assert claim.deliveries == 1
    await store.complete(claim, result_of(claim))
    assert await store.queue_depth() == 0


async def test_deliveries_add_up_over_releases_and_take_overs(store, job):
    await submit(store, job)
    await upload(store, job)
    await store.claim("one", count=1, block_s=1)
    taken = await store.reclaim("two", idle_s=0, count=1)
    await store.release("two", taken)
    (claim,) = await store.claim("three", count=1, block_s=1)
    assert claim.deliveries == 2
    (claim,) = await store.reclaim("four", idle_s=0, count=1)
    assert claim.deliveries == 3


async def test_who_was_given_up_may_still_finish_what_was_queued_again(store, job):
    await submit(store, job)
    await upload(store, job)
    (slow,) = await store.claim("slow", count=1, block_s=1)
    await store.release("heir", await store.reclaim("heir", idle_s=0, count=1))
    await store.complete(slow, result_of(slow))
    assert await store.get_results(job, "sb") == [result_of(slow)]
    assert await store.queue_depth() == 0
    assert await store.claim("c", count=1, block_s=0.05) == []


async def end_by(store, job, how):
    """Takes the super-batch "sb" out of flight."""
    if how == "decision":
        await store.decide(decision(job), keep_s=60)
    elif how == "letter":
        await store.dead_letter(letter(job))
    else:
        await store.dead_letter_overdue(now_s=time.time() + 1000)


@pytest.mark.parametrize("how", ["decision", "letter", "deadline"])
async def test_shards_of_what_is_not_in_flight_any_more_leave_the_queue(store, job, how):
    await submit(store, job)
    await upload(store, job, shards=3)
    (claimed,) = await store.claim("c", count=1, block_s=1)
    await end_by(store, job, how)
    assert await store.queue_depth() == 0
    assert await store.oldest_queued_age_s(now_s=time.time()) == 0
    assert await store.claim("c", count=10, block_s=0.05) == []
    assert await store.reclaim("d", idle_s=0, count=10) == []
    await store.keep("c", [claimed])
    await store.release("c", [claimed])
    await store.complete(claimed, result_of(claimed))
    assert await store.queue_depth() == 0
    assert await store.get_results(job, "sb") == []
    assert await upload(store, job, digest="late") is UploadStatus.GONE


async def test_the_queue_tells_its_depth_and_the_age_of_its_oldest(store, job):
    assert await store.oldest_queued_age_s(now_s=time.time()) == 0
    await submit(store, job)
    await upload(store, job, shards=3)
    assert await store.queue_depth() == 3
    age = await store.oldest_queued_age_s(now_s=time.time() + 100)
    assert 99 < age < 105


# Deciding


async def test_the_first_decision_stands(store, job):
    await submit(store, job)
    first = decision(job)
    assert await store.decide(first, keep_s=60) == first
    assert await store.decide(decision(job, seed=8), keep_s=60) == first
    assert await store.get_decision(job, "sb") == first
    assert await store.get_super_batch(job, "sb") is None
    counters = await store.counters(job)
    assert (counters.selected, counters.examples_loaded, counters.examples_selected) == (1, 10, 2)
    assert (counters.cache_hits, counters.reference_inferences, counters.fallbacks) == (6, 4, 0)


async def test_of_many_who_decide_at_once_one_does(store, job):
    await submit(store, job)
    answers = await asyncio.gather(*(store.decide(decision(job, seed=i), keep_s=60) for i in range(20)))
    assert len({answer.seed for answer in answers}) == 1
    assert await accounts(store, job) == (1, 1, 0, 0)


async def test_a_fallback_is_counted(store, job):
    await submit(store, job)
    await store.decide(decision(job, fallback="uniform", fallback_reason="late"), keep_s=60)
    assert (await store.counters(job)).fallbacks == 1


async def test_a_decision_is_kept_as_long_as_asked(store, job):
    await submit(store, job)
    await store.decide(decision(job), keep_s=0.2)

    async def forgotten():
        return await store.get_decision(job, "sb") is None

    await wait_for(forgotten, timeout_s=2)
    with pytest.raises(SuperBatchUnknown):
        await store.decide(decision(job), keep_s=60)
    assert await accounts(store, job) == (1, 1, 0, 0)


async def test_what_is_dead_or_was_never_submitted_cannot_be_decided(store, job):
    with pytest.raises(SuperBatchUnknown):
        await store.decide(decision(job), keep_s=60)
    await submit(store, job)
    await store.dead_letter(letter(job))
    with pytest.raises(DeadLettered):
        await store.decide(decision(job), keep_s=60)
    assert await accounts(store, job) == (1, 0, 1, 0)


async def test_a_dead_letter_is_written_once_and_found(store, job):
    await submit(store, job)
    assert await store.dead_letter(letter(job))
    assert not await store.dead_letter(letter(job, at_s=9.0))
    assert await store.get_dead_letter(job, "sb") == letter(job)
    assert await store.get_dead_letter(job, "other") is None


async def test_dead_letters_are_listed_newest_first(store, job):
    for i in range(3):
        await submit(store, job, f"sb-{i}")
        await store.dead_letter(letter(job, f"sb-{i}", at_s=float(i)))
    assert [found.super_batch_id for found in await store.list_dead_letters(job, limit=2)] == ["sb-2", "sb-1"]


async def test_only_what_is_overdue_expires(store, job):
    await submit(store, job, "late", ttl_s=1, now_s=100.0)
    await submit(store, job, "fine", ttl_s=1, now_s=time.time())
    letters = [found for found in await store.dead_letter_overdue(now_s=200.0) if found.job == job]
    assert [(found.super_batch_id, found.reason) for found in letters] == [("late", "EXPIRED")]
    assert await accounts(store, job) == (2, 0, 1, 1)


async def test_however_many_are_overdue_all_expire(store, job):
    for i in range(230):
        await submit(store, job, f"sb-{i}", max_in_flight=1000, now_s=100.0)
    sweeps = await asyncio.gather(*(store.dead_letter_overdue(now_s=200.0) for _ in range(3)))
    expired = [found.super_batch_id for letters in sweeps for found in letters]
    assert sorted(expired) == sorted(f"sb-{i}" for i in range(230))
    assert await accounts(store, job) == (230, 0, 230, 0)


async def test_only_the_newest_letters_are_kept(store, job):
    for i in range(1005):
        await submit(store, job, f"sb-{i:04d}")
        await store.dead_letter(letter(job, f"sb-{i:04d}", at_s=float(i)))
    letters = await store.list_dead_letters(job, limit=5000)
    assert [found.super_batch_id for found in letters] == [f"sb-{i:04d}" for i in range(1004, 4, -1)]
    assert await store.get_dead_letter(job, "sb-0004") is None
    assert await accounts(store, job) == (1005, 0, 1005, 0)


async def test_accounts_balance_whatever_many_do_at_once(store, job):
    """Random operations on few super-batches by concurrent callers, the balance checked between any two."""
    dice = random.Random(14)

    async def score(_):
        for claim in await store.claim(str(dice.random()), count=2, block_s=0.001):
            await store.complete(claim, result_of(claim))

    async def decide(super_batch_id):
        with suppress(DeadLettered, SuperBatchUnknown):
            await store.decide(decision(job, super_batch_id), keep_s=60)

    operations = [
        lambda sb: submit(store, job, sb, max_in_flight=4, ttl_s=dice.choice([0.0, 60.0])),
        lambda sb: submit(store, job, sb, max_in_flight=4),
        lambda sb: upload(store, job, sb),
        score,
        decide,
        lambda sb: store.dead_letter(letter(job, sb)),
        lambda _: store.dead_letter_overdue(now_s=time.time()),
    ]

    async def act():
        for _ in range(25):
            await dice.choice(operations)(f"sb-{dice.randrange(12)}")
            await accounts(store, job)

    await asyncio.gather(*(act() for _ in range(8)))
    submitted, selected, dead, in_flight = await accounts(store, job)
    assert submitted == selected + dead + in_flight
    assert submitted > 0
