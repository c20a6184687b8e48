"""The same suite's other half: uploads, the queue of shards between selectors and scorers, and the news."""

from __future__ import annotations

import asyncio
import time

import pytest

from jest_server.domain.super_batches import SuperBatchRef, UploadStatus
from support.polling import wait_for, within
from support.super_batches import (
    REFERENCE,
    dead_letter,
    decision,
    result_of,
    shard,
    spec,
    submit,
    upload,
)


async def test_an_upload_is_queued_whole_and_once(stores, job):
    await submit(stores, job)
    assert await upload(stores, job, shards=3) is UploadStatus.ACCEPTED
    assert await upload(stores, job, shards=3) is UploadStatus.REPEATED
    held = await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb"))
    assert held.pending_shards == 3
    assert held.uploads == {0: {"u": (0, 1)}}
    claims = await stores.queue.claim("c", REFERENCE, count=10, block_s=0.1)
    assert [claim.shard for claim in claims] == [shard(job, number=i) for i in range(3)]
    assert {claim.deliveries for claim in claims} == {1}


async def test_of_many_same_uploads_at_once_one_is_queued(stores, job):
    await submit(stores, job)
    answers = await asyncio.gather(*(upload(stores, job, shards=2) for _ in range(8)))
    assert sorted(answer.value for answer in answers) == ["accepted"] + ["repeated"] * 7
    assert await stores.queue.depth() == 2
    assert len(await stores.queue.claim("c", REFERENCE, count=9, block_s=1)) == 2


async def test_another_upload_of_the_same_rank_is_queued_beside_the_first(stores, job):
    await submit(stores, job)
    await upload(stores, job, digest="u")
    assert await upload(stores, job, digest="v") is UploadStatus.ACCEPTED
    held = await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb"))
    assert (set(held.uploads[0]), held.pending_shards) == ({"u", "v"}, 2)


async def test_an_upload_without_shards_is_remembered(stores, job):
    await submit(stores, job)
    assert await upload(stores, job, shards=0) is UploadStatus.ACCEPTED
    assert await upload(stores, job, shards=0) is UploadStatus.REPEATED
    assert await stores.queue.depth() == 0


async def test_an_upload_for_nothing_in_flight_is_gone(stores, job):
    assert await upload(stores, job) is UploadStatus.GONE
    assert await stores.queue.claim("c", REFERENCE, count=1, block_s=0.05) == []


async def test_every_listener_hears_of_a_result_that_is_there_already(stores, job):
    heard = [asyncio.Event(), asyncio.Event()]

    async def listen(done):
        async for event in stores.super_batches.events():
            if event.ref.super_batch_id == "sb":
                assert len(await stores.super_batches.get_results(SuperBatchRef(job, "sb"))) == 1
                done.set()

    listeners = [asyncio.create_task(listen(event)) for event in heard]
    await asyncio.sleep(0.1)  # news are for those who listen: both have to have begun
    await submit(stores, job)
    await upload(stores, job)
    (claim,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    await stores.queue.complete(claim, result_of(claim))
    async with asyncio.timeout(30):
        await asyncio.gather(*(event.wait() for event in heard))
    for listener in listeners:
        listener.cancel()
    await asyncio.gather(*listeners, return_exceptions=True)
    assert await stores.super_batches.get_results(SuperBatchRef(job, "sb")) == [result_of(claim)]
    assert (await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb"))).pending_shards == 0


async def test_whatever_ends_a_super_batch_is_news(stores, job):
    await stores.jobs.create_job(spec("other"), now_s=1.0)
    for name, super_batch_id in ((job, "decided"), (job, "dead"), (job, "late"), ("other", "deleted")):
        await submit(stores, name, super_batch_id, now_s=100.0 if super_batch_id == "late" else None)
    heard = set()

    async def listen():
        async for event in stores.super_batches.events():
            heard.add(event.ref.super_batch_id)

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0.1)  # as above
    await stores.decisions.decide(decision(job, "decided"), keep_s=60)
    await stores.decisions.dead_letter(dead_letter(job, "dead"))
    await stores.decisions.dead_letter_overdue(now_s=200.0)
    await stores.jobs.delete_job("other")

    async def all_heard():
        return heard == {"decided", "dead", "late", "deleted"}

    await wait_for(all_heard)
    listener.cancel()
    await asyncio.gather(listener, return_exceptions=True)


async def test_completing_twice_counts_once(stores, job):
    await submit(stores, job)
    await upload(stores, job, shards=2)
    claim, _ = await stores.queue.claim("c", REFERENCE, count=2, block_s=1)
    await stores.queue.complete(claim, result_of(claim, inferred=2))
    await stores.queue.complete(claim, result_of(claim, inferred=0))
    assert [result.inferred for result in await stores.super_batches.get_results(SuperBatchRef(job, "sb"))] == [2]
    assert (await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb"))).pending_shards == 1


async def test_who_waits_for_a_shard_gets_it_when_it_comes(stores, job):
    waiting = asyncio.create_task(stores.queue.claim("c", REFERENCE, count=1, block_s=20))
    await asyncio.sleep(0.05)
    await submit(stores, job)
    await upload(stores, job)
    with within(1):
        assert len(await waiting) == 1


async def test_who_waits_in_vain_is_told_in_time(stores):
    started = time.monotonic()
    with within(1.5):
        assert await stores.queue.claim("c", REFERENCE, count=1, block_s=0.2) == []
    assert time.monotonic() - started > 0.19
    assert await stores.queue.claim("c", REFERENCE, count=1, block_s=0) == []


async def test_many_consumers_share_the_shards_out(stores, job):
    await submit(stores, job)
    await upload(stores, job, shards=30)
    taken = await asyncio.gather(*(stores.queue.claim(f"c{i}", REFERENCE, count=3, block_s=0.2) for i in range(12)))
    shard_ids = [claim.shard.shard_id for claims in taken for claim in claims]
    assert len(shard_ids) == len(set(shard_ids)) == 30


async def test_a_claimed_shard_is_nobody_elses(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    assert len(await stores.queue.claim("one", REFERENCE, count=5, block_s=1)) == 1
    assert await stores.queue.claim("two", REFERENCE, count=5, block_s=0.05) == []
    assert await stores.queue.reclaim("two", REFERENCE, idle_s=60, count=5) == []


async def test_a_claim_left_alone_is_taken_over_with_one_more_delivery(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    (claim,) = await stores.queue.claim("one", REFERENCE, count=1, block_s=1)
    await asyncio.sleep(0.8)
    (taken,) = await stores.queue.reclaim("two", REFERENCE, idle_s=0.7, count=5)
    assert (taken.shard, taken.deliveries) == (claim.shard, 2)
    assert await stores.queue.reclaim("three", REFERENCE, idle_s=0.7, count=5) == []


async def test_an_abandoned_claim_is_found_behind_many_that_are_kept(stores, job):
    await submit(stores, job)
    await upload(stores, job, shards=40)
    kept = await stores.queue.claim("alive", REFERENCE, count=39, block_s=1)
    (left,) = await stores.queue.claim("dead", REFERENCE, count=1, block_s=1)
    await asyncio.sleep(0.8)
    await stores.queue.heartbeat("alive", kept)
    assert [claim.shard for claim in await stores.queue.reclaim("heir", REFERENCE, idle_s=0.7, count=1)] == [left.shard]


async def test_no_more_is_taken_over_than_asked(stores, job):
    await submit(stores, job)
    await upload(stores, job, shards=30)
    assert len(await stores.queue.claim("dead", REFERENCE, count=30, block_s=1)) == 30
    await asyncio.sleep(0.02)
    taken = await stores.queue.reclaim("heir", REFERENCE, idle_s=0.01, count=25)
    assert [claim.shard.shard_id for claim in taken] == [f"0-u-{i:03d}" for i in range(25)]
    assert {claim.deliveries for claim in taken} == {2}


async def test_of_many_who_take_over_one_does(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    await stores.queue.claim("dead", REFERENCE, count=1, block_s=1)
    await asyncio.sleep(0.8)
    taken = await asyncio.gather(*(stores.queue.reclaim(f"c{i}", REFERENCE, idle_s=0.7, count=1) for i in range(10)))
    assert sum(map(len, taken)) == 1


async def test_a_kept_claim_is_not_taken_over(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    claims = await stores.queue.claim("one", REFERENCE, count=1, block_s=1)
    for _ in range(4):
        await asyncio.sleep(0.3)
        await stores.queue.heartbeat("one", claims)
    assert await stores.queue.reclaim("two", REFERENCE, idle_s=1.0, count=1) == []


async def test_who_lost_a_claim_cannot_keep_or_release_it(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    claims = await stores.queue.claim("one", REFERENCE, count=1, block_s=1)
    await asyncio.sleep(0.1)
    assert len(await stores.queue.reclaim("two", REFERENCE, idle_s=0.05, count=1)) == 1
    await stores.queue.heartbeat("one", claims)
    await stores.queue.release("one", claims)
    assert await stores.queue.claim("one", REFERENCE, count=1, block_s=0.05) == []


async def test_a_released_shard_is_taken_at_once_and_counts_no_delivery(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    await stores.queue.release("one", await stores.queue.claim("one", REFERENCE, count=1, block_s=1))
    (claim,) = await stores.queue.claim("two", REFERENCE, count=1, block_s=1)
    assert claim.deliveries == 1
    await stores.queue.complete(claim, result_of(claim))
    assert await stores.queue.depth() == 0


async def test_a_claim_tells_when_its_shard_was_queued_whoever_had_it_in_between(stores, job):
    await submit(stores, job)
    before_s = time.time()
    await upload(stores, job)
    after_s = time.time()
    (first,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    assert before_s - 0.001 <= first.queued_at_s <= after_s + 0.001
    await stores.queue.release("c", [first])
    (again,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    (taken,) = await stores.queue.reclaim("d", REFERENCE, idle_s=0, count=1)
    assert first.queued_at_s == again.queued_at_s == taken.queued_at_s


async def test_deliveries_add_up_over_releases_and_take_overs(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    await stores.queue.claim("one", REFERENCE, count=1, block_s=1)
    taken = await stores.queue.reclaim("two", REFERENCE, idle_s=0, count=1)
    await stores.queue.release("two", taken)
    (claim,) = await stores.queue.claim("three", REFERENCE, count=1, block_s=1)
    assert claim.deliveries == 2
    (claim,) = await stores.queue.reclaim("four", REFERENCE, idle_s=0, count=1)
    assert claim.deliveries == 3


async def test_who_was_given_up_may_still_finish_what_was_queued_again(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    (slow,) = await stores.queue.claim("slow", REFERENCE, count=1, block_s=1)
    await stores.queue.release("heir", await stores.queue.reclaim("heir", REFERENCE, idle_s=0, count=1))
    await stores.queue.complete(slow, result_of(slow))
    assert await stores.super_batches.get_results(SuperBatchRef(job, "sb")) == [result_of(slow)]
    assert await stores.queue.depth() == 0
    assert await stores.queue.claim("c", REFERENCE, count=1, block_s=0.05) == []


async def end_by(stores, job, how):
    """Takes the super-batch "sb" out of flight."""
    if how == "decision":
        await stores.decisions.decide(decision(job), keep_s=60)
    elif how == "letter":
        await stores.decisions.dead_letter(dead_letter(job))
    else:
        await stores.decisions.dead_letter_overdue(now_s=time.time() + 1000)


@pytest.mark.parametrize("how", ["decision", "letter", "deadline"])
async def test_shards_of_what_is_not_in_flight_any_more_leave_the_queue(stores, job, how):
    await submit(stores, job)
    await upload(stores, job, shards=3)
    (claimed,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    await end_by(stores, job, how)
    assert await stores.queue.depth() == 0
    assert await stores.queue.oldest_age_s(now_s=time.time()) == 0
    assert await stores.queue.claim("c", REFERENCE, count=10, block_s=0.05) == []
    assert await stores.queue.reclaim("d", REFERENCE, idle_s=0, count=10) == []
    await stores.queue.heartbeat("c", [claimed])
    await stores.queue.release("c", [claimed])
    await stores.queue.complete(claimed, result_of(claimed))
    assert await stores.queue.depth() == 0
    assert await stores.super_batches.get_results(SuperBatchRef(job, "sb")) == []
    assert await upload(stores, job, digest="late") is UploadStatus.GONE


async def test_the_queue_tells_its_depth_and_the_age_of_its_oldest(stores, job):
    assert await stores.queue.oldest_age_s(now_s=time.time()) == 0
    await submit(stores, job)
    await upload(stores, job, shards=3)
    assert await stores.queue.depth() == 3
    age = await stores.queue.oldest_age_s(now_s=time.time() + 100)
    assert 99 < age < 105
