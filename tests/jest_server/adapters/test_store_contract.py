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
from jest_server.errors import DeadLettered, SuperBatchUnknown
from jest_server.model import (
    DeadLetter,
    Decision,
    JobSpec,
    PolicySpec,
    ReferenceInfo,
    ReferenceInput,
    Shard,
    ShardResult,
    Submission,
    SubmitStatus,
    UploadStatus,
)
from support.servers import queue_kinds, queue_server_of

REFERENCE = ReferenceInfo(
    name="ref",
    version="1",
    preprocessing_id="p",
    scale=10.0,
    bias=-10.0,
    embedding_width=2,
    inputs=(ReferenceInput(name="x", datatype="FP32", shape=(3,)),),
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
    store = MemorySuperBatchStore() if store_url is None else RedisSuperBatchStore.from_url(store_url)
    # The queue is shared by all tests of a server: nothing of an earlier one may be left in it.
    while await store.queue_depth():
        waiting = await store.claim("cleaner", count=100, block_s=0.01)
        for claim in waiting + await store.reclaim("cleaner", idle_s=0, count=100):
            await store.complete(claim, result_of(claim))
    yield store
    await store.close()


@pytest.fixture
async def job(store):
    name = f"job-{uuid.uuid4().hex[:10]}"
    await store.create_job(spec(name), now_s=1.0)
    return name


def spec(name, **fields):
    return JobSpec(name=name, reference_model="ref", policy=PolicySpec(sub_batch_size=16), **fields)


def submission(job, super_batch_id="sb", *, rank=0, world_size=1, digest="d", keys=("a", "b"), reference=REFERENCE):
    return Submission(
        job=job,
        super_batch_id=super_batch_id,
        rank=rank,
        world_size=world_size,
        reference=reference,
        keys=keys,
        digest=digest,
    )


async def submit(store, *args, max_in_flight=100, ttl_s=60.0, now_s=None, **fields):
    now_s = time.time() if now_s is None else now_s
    return await store.submit(submission(*args, **fields), max_in_flight=max_in_flight, ttl_s=ttl_s, now_s=now_s)


def shard(job, super_batch_id="sb", number=0, features=b"features"):
    return Shard(f"0-u-{number}", job, super_batch_id, "ref", "1", ("a", "b"), features)


async def upload(store, job, super_batch_id="sb", *, shards=1, digest="u"):
    pieces = [shard(job, super_batch_id, number) for number in range(shards)]
    return await store.add_upload(job, super_batch_id, 0, digest=digest, positions=(0, 1), shards=pieces)


def result_of(claim, inferred=2):
    return ShardResult(claim.shard.keys, b"\x00" * 16, inferred)


def decision(job, super_batch_id="sb", **fields):
    values = {
        "policy": PolicySpec(sub_batch_size=16),
        "seed": 7,
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


def letter(job, super_batch_id="sb", at_s=5.0):
    return DeadLetter(job=job, super_batch_id=super_batch_id, reason="R", detail="why", at_s=at_s)


async def accounts(store, job):
    c = await store.counters(job)
    assert c.submitted == c.selected + c.dead_lettered + c.in_flight
    return c.submitted, c.selected, c.dead_lettered, c.in_flight


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
    mark = f"z{uuid.uuid4().hex[:8]}"
    for letter_ in "cab":
        await store.create_job(spec(f"{mark}-{letter_}"), now_s=1.0)
    page = await store.list_jobs(after=mark, limit=2)
    assert [job.spec.name for job in page] == [f"{mark}-a", f"{mark}-b"]
    rest = await store.list_jobs(after=f"{mark}-b", limit=1)
    assert [job.spec.name for job in rest] == [f"{mark}-c"]


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
    assert await store.claim("c", count=1, block_s=0.05) == []


# Reference models


async def test_an_announcement_lasts_as_long_as_it_says(store):
    info = REFERENCE.model_copy(update={"name": uuid.uuid4().hex})
    assert await store.get_reference(info.name) is None
    await store.announce_reference(info, ttl_s=0.3)
    assert await store.get_reference(info.name) == info
    await asyncio.sleep(0.4)
    assert await store.get_reference(info.name) is None


# Submitting


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


async def test_an_upload_for_nothing_in_flight_is_gone(store, job):
    assert await upload(store, job) is UploadStatus.GONE
    assert await store.claim("c", count=1, block_s=0.05) == []


async def test_a_result_is_there_before_its_news(store, job):
    heard = asyncio.Event()

    async def listen():
        async for news in store.news():
            if (news.job, news.super_batch_id) == (job, "sb"):
                assert len(await store.get_results(job, "sb")) == 1
                heard.set()

    listeners = [asyncio.create_task(listen()) for _ in range(2)]
    await asyncio.sleep(0.1)
    await submit(store, job)
    await upload(store, job)
    (claim,) = await store.claim("c", count=1, block_s=1)
    await store.complete(claim, result_of(claim))
    async with asyncio.timeout(5):
        await heard.wait()
    for listener in listeners:
        listener.cancel()
    assert await store.get_results(job, "sb") == [result_of(claim)]
    assert (await store.get_super_batch(job, "sb")).pending_shards == 0


async def test_completing_twice_counts_once(store, job):
    await submit(store, job)
    await upload(store, job, shards=2)
    claim, _ = await store.claim("c", count=2, block_s=1)
    await store.complete(claim, result_of(claim, inferred=2))
    await store.complete(claim, result_of(claim, inferred=0))
    assert [result.inferred for result in await store.get_results(job, "sb")] == [2]
    assert (await store.get_super_batch(job, "sb")).pending_shards == 1


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


async def test_shards_of_what_is_not_in_flight_any_more_are_dropped(store, job):
    for super_batch_id in ("decided", "dead", "open"):
        await submit(store, job, super_batch_id)
        await upload(store, job, super_batch_id)
    await store.decide(decision(job, "decided"), keep_s=60)
    await store.dead_letter(letter(job, "dead"))
    claims = await store.claim("c", count=10, block_s=0.5)
    assert [claim.shard.super_batch_id for claim in claims] == ["open"]
    assert await store.queue_depth() == 1


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
    await asyncio.sleep(0.3)
    assert await store.get_decision(job, "sb") is None


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


async def test_accounts_balance_whatever_many_do_at_once(store, job):
    """Random operations on few super-batches by concurrent callers, the balance checked between any two."""
    dice = random.Random(job)

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
