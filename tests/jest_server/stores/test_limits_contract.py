"""How much of what a job, a tenant and the whole server may hold, by every store."""

from __future__ import annotations

import pytest

from jest_server.domain.super_batches import Limits, SubmitStatus, UploadStatus
from support.super_batches import REFERENCE, decision, letter, result_of, spec, submit, upload

BLOB = bytes(1000)


@pytest.fixture
async def tenants(any_store):
    """Two jobs of one tenant, one of another."""
    names = ["red~one", "red~two", "blue~one"]
    for name in names:
        await any_store.create_job(spec(name), now_s=1.0)
    return names


async def test_a_job_a_tenant_and_the_server_have_limits_of_their_own(any_store, tenants):
    one, two, other = tenants
    limits = {"max_in_flight": 2, "tenant": 3, "server": 4}
    assert await submit(any_store, one, "a", **limits) is SubmitStatus.ACCEPTED
    assert await submit(any_store, one, "b", **limits) is SubmitStatus.ACCEPTED
    assert await submit(any_store, one, "c", **limits) is SubmitStatus.JOB_FULL
    assert await submit(any_store, two, "a", **limits) is SubmitStatus.ACCEPTED
    assert await submit(any_store, two, "b", **limits) is SubmitStatus.TENANT_FULL
    assert await submit(any_store, other, "a", **limits) is SubmitStatus.ACCEPTED
    assert await submit(any_store, other, "b", **limits) is SubmitStatus.SERVER_FULL
    assert (await any_store.counters(other)).submitted == 1


async def test_what_is_in_flight_already_is_never_one_too_many(any_store, job):
    assert await submit(any_store, job, world_size=2, max_in_flight=1) is SubmitStatus.ACCEPTED
    assert await submit(any_store, job, world_size=2, rank=1, max_in_flight=1) is SubmitStatus.ACCEPTED
    assert await submit(any_store, job, world_size=2, max_in_flight=1) is SubmitStatus.REPEATED


@pytest.mark.parametrize("how", ["decide", "dead_letter", "expire", "delete"])
async def test_what_leaves_flight_makes_room(any_store, tenants, how):
    one, two, _ = tenants
    for name in (one, two):
        await submit(any_store, name, "a", now_s=100.0, ttl_s=10)
    await upload(any_store, one, "a", shards=2, features=BLOB)
    assert await submit(any_store, two, "b", tenant=2) is SubmitStatus.TENANT_FULL
    if how == "decide":
        await any_store.decide(decision(one, "a"), keep_s=60)
    elif how == "dead_letter":
        await any_store.dead_letter(letter(one, "a"))
    elif how == "expire":
        await any_store.dead_letter_overdue(now_s=200.0)
    else:
        await any_store.delete_job(one)
    assert await any_store.bytes_held(one) == Limits()
    assert await submit(any_store, two, "b", tenant=2) is SubmitStatus.ACCEPTED


async def test_features_count_until_they_are_scored(any_store, tenants):
    one, two, _ = tenants
    for name in tenants:
        await submit(any_store, name, "a")
        await upload(any_store, name, "a", shards=2, features=BLOB)
    held = await any_store.bytes_held(one)
    assert 2000 <= held.job <= 2400
    assert (held.tenant, held.server) == (2 * held.job, 3 * held.job)
    claims = await any_store.claim("c", REFERENCE, count=3, block_s=0)
    for claim in claims:
        await any_store.complete(claim, result_of(claim))
        await any_store.complete(claim, result_of(claim))
    assert (await any_store.bytes_held(one)).server == held.server // 2
    (rest,) = await any_store.claim("c", REFERENCE, count=1, block_s=0)
    await any_store.release("c", [rest])
    await any_store.complete(rest, result_of(rest))
    assert (await any_store.bytes_held(two)).server == held.server // 3
    assert await any_store.bytes_held("nobody") == Limits(server=held.server // 3)


@pytest.mark.parametrize("whose", ["job", "tenant", "server"])
async def test_features_beyond_a_limit_are_refused_and_nothing_is_kept(any_store, tenants, whose):
    first, second = {"job": (0, 0), "tenant": (0, 1), "server": (0, 2)}[whose]
    limits = Limits(**{whose: 3500})
    for name in tenants:
        await submit(any_store, name, "a")
    assert await upload(any_store, tenants[first], "a", shards=2, features=BLOB, limits=limits)
    refused = await upload(any_store, tenants[second], "a", shards=2, digest="v", features=BLOB, limits=limits)
    assert refused is UploadStatus(whose)
    assert await any_store.queue_depth() == 2
    assert (await any_store.bytes_held(tenants[0])).server < 3000
    for claim in await any_store.claim("c", REFERENCE, count=2, block_s=0):
        await any_store.complete(claim, result_of(claim))
    again = await upload(any_store, tenants[second], "a", shards=2, digest="v", features=BLOB, limits=limits)
    assert again is UploadStatus.ACCEPTED


async def test_an_upload_that_is_there_is_repeated_though_nothing_more_fits(any_store, job):
    await submit(any_store, job)
    await upload(any_store, job, features=BLOB)
    assert await upload(any_store, job, features=BLOB, limits=Limits(job=1)) is UploadStatus.REPEATED


async def test_nothing_is_remembered_of_what_holds_nothing(own_server, own_store):
    await own_store.create_job(spec("red~one"), now_s=1.0)
    await submit(own_store, "red~one", "a")
    await upload(own_store, "red~one", "a", features=BLOB)
    await own_store.decide(decision("red~one", "a"), keep_s=60)
    assert await own_store._client.exists("{jest}:usage") == 0


async def test_of_many_decisions_the_newest_are_kept(any_store, job):
    for number in range(5):
        await submit(any_store, job, f"sb-{number}")
        await any_store.decide(decision(job, f"sb-{number}"), keep_s=60 + number, keep_count=2)
    found = [await any_store.get_decision(job, f"sb-{number}") is not None for number in range(5)]
    assert found == [False, False, False, True, True]
    assert (await any_store.counters(job)).selected == 5
