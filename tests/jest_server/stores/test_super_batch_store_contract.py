"""Every SuperBatchStore: submissions, uploads, results, events, and limits on what is in flight."""

from __future__ import annotations

import asyncio
import time

import pytest

from jest_server.domain.errors import JobUnknown
from jest_server.domain.super_batches import Limits, SubmitResult, SubmitStatus, SuperBatchRef, UploadStatus
from support.polling import wait_for
from support.super_batches import (
    REFERENCE,
    accounts,
    dead_letter,
    decision,
    result_of,
    shard,
    spec,
    submission,
    submit,
    upload,
)


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


async def test_a_super_batch_may_have_no_labels_and_no_reference_model(stores, job):
    assert await submit(stores, job, reference=None) is SubmitStatus.ACCEPTED
    held = await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb"))
    assert held.reference is held.submissions[0].reference is None
    assert held.submissions[0].group_labels == ()
    recorded = await stores.decisions.decide(decision(job, reference=None), keep_s=60)
    assert recorded.reference is None


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (2**63, 2**63 + 1)])
async def test_another_step_than_the_first_ranks_is_a_conflict_for_every_rank(stores, job, first, second):
    await submit(stores, job, rank=0, world_size=2, step=first)
    assert await submit(stores, job, rank=1, world_size=2, step=second) is SubmitStatus.CONFLICT
    assert await submit(stores, job, rank=0, world_size=2, step=second) is SubmitStatus.CONFLICT
    assert set((await stores.super_batches.get_super_batch(SuperBatchRef(job, "sb"))).submissions) == {0}
    assert await submit(stores, job, rank=1, world_size=2, step=first) is SubmitStatus.ACCEPTED
    assert await accounts(stores, job) == (1, 0, 0, 1)


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
        SubmitStatus.REPEATED, REFERENCE, 0, frozenset({0, 2})
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


BLOB = bytes(1000)


@pytest.fixture
async def tenants(stores):
    """Two jobs of one tenant, one of another."""
    names = ["red~one", "red~two", "blue~one"]
    for name in names:
        await stores.jobs.create_job(spec(name), now_s=1.0)
    return names


async def test_a_job_a_tenant_and_the_server_have_limits_of_their_own(stores, tenants):
    one, two, other = tenants
    limits = {"max_in_flight": 2, "tenant": 3, "server": 4}
    assert await submit(stores, one, "a", **limits) is SubmitStatus.ACCEPTED
    assert await submit(stores, one, "b", **limits) is SubmitStatus.ACCEPTED
    assert await submit(stores, one, "c", **limits) is SubmitStatus.JOB_FULL
    assert await submit(stores, two, "a", **limits) is SubmitStatus.ACCEPTED
    assert await submit(stores, two, "b", **limits) is SubmitStatus.TENANT_FULL
    assert await submit(stores, other, "a", **limits) is SubmitStatus.ACCEPTED
    assert await submit(stores, other, "b", **limits) is SubmitStatus.SERVER_FULL
    assert (await stores.jobs.counters(other)).submitted == 1


async def test_what_is_in_flight_already_is_never_one_too_many(stores, job):
    assert await submit(stores, job, world_size=2, max_in_flight=1) is SubmitStatus.ACCEPTED
    assert await submit(stores, job, world_size=2, rank=1, max_in_flight=1) is SubmitStatus.ACCEPTED
    assert await submit(stores, job, world_size=2, max_in_flight=1) is SubmitStatus.REPEATED


@pytest.mark.parametrize("how", ["decide", "dead_letter", "expire", "delete"])
async def test_what_leaves_flight_makes_room(stores, tenants, how):
    one, two, _ = tenants
    for name in (one, two):
        await submit(stores, name, "a", now_s=100.0, ttl_s=10)
    await upload(stores, one, "a", shards=2, features=BLOB)
    assert await submit(stores, two, "b", tenant=2) is SubmitStatus.TENANT_FULL
    if how == "decide":
        await stores.decisions.decide(decision(one, "a"), keep_s=60)
    elif how == "dead_letter":
        await stores.decisions.dead_letter(dead_letter(one, "a"))
    elif how == "expire":
        await stores.decisions.dead_letter_overdue(now_s=200.0)
    else:
        await stores.jobs.delete_job(one)
    assert await stores.super_batches.bytes_held(one) == Limits()
    assert await submit(stores, two, "b", tenant=2) is SubmitStatus.ACCEPTED


async def test_features_count_until_they_are_scored(stores, tenants):
    one, two, _ = tenants
    for name in tenants:
        await submit(stores, name, "a")
        await upload(stores, name, "a", shards=2, features=BLOB)
    held = await stores.super_batches.bytes_held(one)
    assert 2000 <= held.job <= 2400
    assert (held.tenant, held.server) == (2 * held.job, 3 * held.job)
    claims = await stores.queue.claim("c", REFERENCE, count=3, block_s=0)
    for claim in claims:
        await stores.queue.complete(claim, result_of(claim))
        await stores.queue.complete(claim, result_of(claim))
    assert (await stores.super_batches.bytes_held(one)).server == held.server // 2
    (rest,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=0)
    await stores.queue.release("c", [rest])
    await stores.queue.complete(rest, result_of(rest))
    assert (await stores.super_batches.bytes_held(two)).server == held.server // 3
    assert await stores.super_batches.bytes_held("nobody") == Limits(server=held.server // 3)


@pytest.mark.parametrize("whose", ["job", "tenant", "server"])
async def test_features_beyond_a_limit_are_refused_and_nothing_is_kept(stores, tenants, whose):
    first, second = {"job": (0, 0), "tenant": (0, 1), "server": (0, 2)}[whose]
    limits = Limits(**{whose: 3500})
    for name in tenants:
        await submit(stores, name, "a")
    assert await upload(stores, tenants[first], "a", shards=2, features=BLOB, limits=limits)
    refused = await upload(stores, tenants[second], "a", shards=2, digest="v", features=BLOB, limits=limits)
    assert refused is UploadStatus(whose)
    assert await stores.queue.depth() == 2
    assert (await stores.super_batches.bytes_held(tenants[0])).server < 3000
    for claim in await stores.queue.claim("c", REFERENCE, count=2, block_s=0):
        await stores.queue.complete(claim, result_of(claim))
    again = await upload(stores, tenants[second], "a", shards=2, digest="v", features=BLOB, limits=limits)
    assert again is UploadStatus.ACCEPTED


async def test_an_upload_that_is_there_is_repeated_though_nothing_more_fits(stores, job):
    await submit(stores, job)
    await upload(stores, job, features=BLOB)
    assert await upload(stores, job, features=BLOB, limits=Limits(job=1)) is UploadStatus.REPEATED


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


async def test_whatever_ends_a_super_batch_publishes_an_event(stores, job):
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


async def test_a_store_tells_what_its_server_uses_and_uploads_add_to_it(stores, job):
    before = await stores.connection.memory()
    await submit(stores, job)
    await upload(stores, job, features=b"f" * (4 << 20))
    after = await stores.connection.memory()
    assert after.used_bytes >= before.used_bytes + (4 << 20)
    assert after.max_bytes == 0
