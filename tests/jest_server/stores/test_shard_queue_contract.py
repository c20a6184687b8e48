"""Every ShardQueue: claims, heartbeats, reclaiming, releasing, completing, and what the queues hold."""

from __future__ import annotations

import asyncio
import time

import pytest

from jest_server.domain.shards import QueueState
from jest_server.domain.super_batches import SuperBatchRef, UploadStatus
from support.polling import within
from support.super_batches import (
    REFERENCE,
    dead_letter,
    decision,
    result_of,
    spec,
    submit,
    upload,
)


async def test_completing_twice_counts_once(stores, job):
    await submit(stores, job)
    await upload(stores, job, shards=2)
    claim, _ = await stores.queue.claim("c", REFERENCE, count=2, block_s=1)
    await stores.queue.complete(claim, result_of(claim, inferred=2))
    await stores.queue.complete(claim, result_of(claim, inferred=0))
    assert [result.inferred for result in await stores.super_batches.get_results(SuperBatchRef(job, "sb"))] == [2]
    assert (await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb"))).pending_shards == 1


async def test_a_waiting_consumer_gets_a_shard_when_it_arrives(stores, job):
    waiting = asyncio.create_task(stores.queue.claim("c", REFERENCE, count=1, block_s=20))
    await asyncio.sleep(0.05)
    await submit(stores, job)
    await upload(stores, job)
    with within(1):
        assert len(await waiting) == 1


async def test_a_claim_in_vain_returns_in_time(stores):
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


async def test_a_claimed_shard_is_not_handed_to_another_consumer(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    assert len(await stores.queue.claim("one", REFERENCE, count=5, block_s=1)) == 1
    assert await stores.queue.claim("two", REFERENCE, count=5, block_s=0.05) == []
    assert await stores.queue.reclaim("two", REFERENCE, idle_s=60, count=5) == []


async def test_a_claim_without_heartbeats_is_reclaimed_with_one_more_delivery(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    (claim,) = await stores.queue.claim("one", REFERENCE, count=1, block_s=1)
    await asyncio.sleep(0.8)
    (taken,) = await stores.queue.reclaim("two", REFERENCE, idle_s=0.7, count=5)
    assert (taken.shard, taken.deliveries) == (claim.shard, 2)
    assert await stores.queue.reclaim("three", REFERENCE, idle_s=0.7, count=5) == []


async def test_an_abandoned_claim_is_found_among_many_with_heartbeats(stores, job):
    await submit(stores, job)
    await upload(stores, job, shards=40)
    kept = await stores.queue.claim("alive", REFERENCE, count=39, block_s=1)
    (left,) = await stores.queue.claim("dead", REFERENCE, count=1, block_s=1)
    await asyncio.sleep(0.8)
    await stores.queue.heartbeat("alive", kept)
    assert [claim.shard for claim in await stores.queue.reclaim("heir", REFERENCE, idle_s=0.7, count=1)] == [left.shard]


async def test_the_claim_without_a_heartbeat_for_longest_is_reclaimed_first(stores, job):
    await submit(stores, job)
    await upload(stores, job, shards=3)
    first, second, third = [(await stores.queue.claim("c", REFERENCE, count=1, block_s=1))[0] for _ in range(3)]
    await stores.queue.heartbeat("c", [first])
    reclaimed = await stores.queue.reclaim("d", REFERENCE, idle_s=0, count=2)
    assert [claim.shard for claim in reclaimed] == [second.shard, third.shard]


async def test_no_more_is_reclaimed_than_asked(stores, job):
    await submit(stores, job)
    await upload(stores, job, shards=30)
    assert len(await stores.queue.claim("dead", REFERENCE, count=30, block_s=1)) == 30
    await asyncio.sleep(0.02)
    taken = await stores.queue.reclaim("heir", REFERENCE, idle_s=0.01, count=25)
    assert [claim.shard.shard_id for claim in taken] == [f"0-u-{i:03d}" for i in range(25)]
    assert {claim.deliveries for claim in taken} == {2}


async def test_of_many_that_reclaim_at_once_one_does(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    await stores.queue.claim("dead", REFERENCE, count=1, block_s=1)
    await asyncio.sleep(0.8)
    taken = await asyncio.gather(*(stores.queue.reclaim(f"c{i}", REFERENCE, idle_s=0.7, count=1) for i in range(10)))
    assert sum(map(len, taken)) == 1


async def test_a_claim_with_heartbeats_is_not_reclaimed(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    claims = await stores.queue.claim("one", REFERENCE, count=1, block_s=1)
    for _ in range(4):
        await asyncio.sleep(0.3)
        await stores.queue.heartbeat("one", claims)
    assert await stores.queue.reclaim("two", REFERENCE, idle_s=1.0, count=1) == []


async def test_a_consumer_that_lost_a_claim_cannot_keep_or_release_it(stores, job):
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


async def test_a_claim_tells_when_its_shard_was_queued_first(stores, job):
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


async def test_deliveries_add_up_over_releases_and_reclaims(stores, job):
    await submit(stores, job)
    await upload(stores, job)
    await stores.queue.claim("one", REFERENCE, count=1, block_s=1)
    taken = await stores.queue.reclaim("two", REFERENCE, idle_s=0, count=1)
    await stores.queue.release("two", taken)
    (claim,) = await stores.queue.claim("three", REFERENCE, count=1, block_s=1)
    assert claim.deliveries == 2
    (claim,) = await stores.queue.reclaim("four", REFERENCE, idle_s=0, count=1)
    assert claim.deliveries == 3


async def test_a_consumer_presumed_dead_may_still_complete_what_was_queued_again(stores, job):
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


NEWER = REFERENCE.model_copy(update={"version": "2"})


async def test_queue_states_tell_what_waits_by_job_and_what_is_being_scored(stores):
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


async def test_a_scorer_of_another_version_claims_and_reclaims_nothing(stores, job):
    await submit(stores, job)
    await upload(stores, job, shards=2)
    assert await stores.queue.claim("newer", NEWER, count=1, block_s=0.05) == []
    assert len(await stores.queue.claim("c", REFERENCE, count=1, block_s=0)) == 1
    assert await stores.queue.reclaim("newer", NEWER, idle_s=0, count=9) == []
    assert len(await stores.queue.reclaim("d", REFERENCE, idle_s=0, count=9)) == 1


async def test_two_versions_are_scored_side_by_side(stores, job):
    await submit(stores, job, "old")
    await submit(stores, job, "new", reference=NEWER)
    await upload(stores, job, "old")
    await upload(stores, job, "new", version="2")
    (newer,) = await stores.queue.claim("c", NEWER, count=9, block_s=0)
    (older,) = await stores.queue.claim("c", REFERENCE, count=9, block_s=0)
    assert (newer.shard.super_batch_id, older.shard.super_batch_id) == ("new", "old")
    await stores.queue.heartbeat("c", [newer, older])
    await stores.queue.complete(newer, result_of(newer))
    await stores.queue.release("c", [older])
    assert await stores.queue.depth() == 1
