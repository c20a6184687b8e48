"""How much of what a job, a tenant and the whole server may hold, by every store."""

from __future__ import annotations

import pytest

from jest_server.domain.super_batches import Limits, SubmitStatus, SuperBatchRef, UploadStatus
from support.super_batches import REFERENCE, dead_letter, decision, result_of, spec, submit, upload

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


async def test_nothing_is_remembered_of_what_holds_nothing(own_server, own_stores):
    await own_stores.jobs.create_job(spec("red~one"), now_s=1.0)
    await submit(own_stores, "red~one", "a")
    await upload(own_stores, "red~one", "a", features=BLOB)
    await own_stores.decisions.decide(decision("red~one", "a"), keep_s=60)
    assert await own_stores.connection.client.exists("{jest}:usage") == 0


async def test_of_many_decisions_the_newest_are_kept(stores, job):
    for number in range(5):
        await submit(stores, job, f"sb-{number}")
        await stores.decisions.decide(decision(job, f"sb-{number}"), keep_s=60 + number, keep_count=2)
    found = [await stores.decisions.get_decision(SuperBatchRef(job, f"sb-{number}")) is not None for number in range(5)]
    assert found == [False, False, False, True, True]
    assert (await stores.jobs.counters(job)).selected == 5
