"""A producer that runs ahead of the scorers: told when to come back, waiting until its deadline, losing nothing.

A real selector and a real queue; no scorer runs, and the test takes its part when it wants to.
"""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
import torch

import jest_trainer as jest
from conformance.speaker import Speaker, features, fresh_keys, refusal_of
from jest_proto.v1 import jobs_pb2
from jest_server.domain.references import ReferenceInput
from jest_server.domain.shards import ShardResult
from jest_server.local.jest_process import JestProcess
from jest_server.stores.redis.stores import open_redis_stores
from support import super_batches
from support.polling import within
from support.servers import QUEUE_KINDS, queue_server_of

REFERENCE = super_batches.REFERENCE.model_copy(
    update={"inputs": (ReferenceInput(name="x", datatype="UINT8", shape=(100_000,)),)}
)
ROWS_OF_A_MEGABYTE = 10
POLICY = jobs_pb2.SelectionPolicy(sub_batch_size=4, num_chunks=2)


@pytest.fixture(scope="module", params=QUEUE_KINDS)
def served(request, tmp_path_factory):
    """A selector whose queue takes 2.5 MB of a job's features, and where its queue is."""
    folder = tmp_path_factory.mktemp("bounds")
    with queue_server_of(request.param, folder / "queue") as queue:
        url = f"{queue.url}/0"
        settings = {
            "queue_url": url,
            "cache_url": f"{queue.url}/1",
            "max_feature_bytes_per_job": 2_500_000,
            "max_super_batches": 5,
            "drain_delay_s": 0,
        }
        selector = JestProcess("selector", "jest_server.selector", folder / "selector.log", settings)
        selector.start()
        yield f"127.0.0.1:{selector.port}", url
        selector.stop()


@pytest.fixture
def speaker(served):
    asyncio.run(announce(served[1]))
    speaker = Speaker(served[0], "ref")
    yield speaker
    speaker.close()


@pytest.fixture
def hurried(served, tmp_path):
    """A client of a second selector, which answers each job twice a second, four times at once."""
    asyncio.run(announce(served[1]))
    settings = {"queue_url": served[1], "cache_url": served[1], "max_calls_per_s_per_job": 2, "drain_delay_s": 0}
    selector = JestProcess("selector", "jest_server.selector", tmp_path / "selector.log", settings)
    selector.start()
    speaker = Speaker(f"127.0.0.1:{selector.port}", "ref")
    yield speaker
    speaker.close()
    selector.stop()


async def announce(url):
    stores = open_redis_stores(url)
    await stores.jobs.announce_reference(REFERENCE, ttl_s=600)
    await stores.connection.close()


async def score_all(url):
    """Does what scorers would with everything that waits."""
    stores = open_redis_stores(url)
    for claim in await stores.queue.claim("test", REFERENCE, count=1000, block_s=1):
        size = len(claim.shard.keys)
        await stores.queue.complete(claim, ShardResult(claim.shard.keys, bytes(size * REFERENCE.value_bytes), size))
    await stores.connection.close()


def submit_and_upload(speaker, job, super_batch_id, rows=ROWS_OF_A_MEGABYTE):
    keys = fresh_keys(rows)
    speaker.submit(job.spec.name, super_batch_id, keys)
    return lambda: speaker.upload(job.spec.name, super_batch_id, list(range(rows)), features(job, keys))


def test_features_beyond_the_limit_are_told_when_to_come_back_and_taken_later(served, speaker):
    job = speaker.create_job(policy=POLICY)
    submit_and_upload(speaker, job, "first")()
    submit_and_upload(speaker, job, "second")()
    third = submit_and_upload(speaker, job, "third")
    with pytest.raises(grpc.RpcError) as caught:
        third()
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert refusal.retry_after_s > 0
    assert f"features of job '{job.spec.name}' that wait for scorers reach the limit of 2500000" in refusal.message
    other = speaker.create_job(policy=POLICY)
    submit_and_upload(speaker, other, "first")()
    asyncio.run(score_all(served[1]))
    assert third().accepted == ROWS_OF_A_MEGABYTE
    asyncio.run(score_all(served[1]))


def test_an_upload_that_could_never_fit_is_a_clear_error(speaker):
    job = speaker.create_job(policy=POLICY)
    with pytest.raises(grpc.RpcError) as caught:
        submit_and_upload(speaker, job, "large", rows=26)()
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["tensors"])
    assert "the limit for job" in refusal.message
    assert "2500000: upload fewer positions at a time" in refusal.message


def test_more_super_batches_than_the_server_takes_are_told_when_to_come_back(speaker):
    jobs = [speaker.create_job(policy=POLICY) for _ in range(3)]
    for number in range(5):
        speaker.submit(jobs[number % 2].spec.name, f"sb-{number}", fresh_keys(16))
    with pytest.raises(grpc.RpcError) as caught:
        speaker.submit(jobs[2].spec.name, "one-too-many", fresh_keys(16))
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert "super-batches in flight of all jobs of this server reach the limit of 5" in refusal.message


def test_more_calls_than_a_job_may_make_are_told_when_to_come_back_and_cost_other_jobs_nothing(hurried):
    busy, other = (hurried.create_job(policy=POLICY).spec.name for _ in range(2))
    keys = fresh_keys(16)

    def submit_without_end():
        while True:
            hurried.submit(busy, "sb", keys)

    with pytest.raises(grpc.RpcError) as caught:
        submit_without_end()
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert f"more than 2 calls a second of job {busy} (JEST_MAX_CALLS_PER_S_PER_JOB)" in refusal.message
    assert 0 < refusal.retry_after_s <= 0.5
    hurried.submit(other, "sb", keys)
    time.sleep(refusal.retry_after_s + 0.05)
    hurried.submit(busy, "sb", keys)


def test_a_trainer_waits_until_its_deadline_and_says_why(served, speaker):
    """Nobody scores: the SDK comes back as it is told, and gives up when its own time is over."""
    with jest.Client(served[0], deadline_s=3.0) as client:
        job = client.create_job(
            fresh_keys(1)[0], reference_model="ref", policy=jest.SelectionPolicy(filter_ratio=0.5, num_chunks=2)
        )
        batch = {"keys": fresh_keys(24), "x": torch.zeros(24, 100_000, dtype=torch.uint8)}
        batches = jest.SelectedBatches(
            job,
            [batch, batch | {"keys": fresh_keys(24)}],
            keys=lambda batch: batch["keys"],
            features=lambda batch: {"x": batch["x"]},
            embed=lambda _: jest.Embeddings(torch.eye(24), torch.eye(24), scale=1.0, bias=0.0),
        )
        with within(3.0 * 2 + 1), pytest.raises(jest.JestError) as caught:
            list(batches)
        assert caught.value.reason in {"QUEUE_FULL", "WAITING_FOR_REFERENCE"}
        speaker.jobs.DeleteJob(jobs_pb2.DeleteJobRequest(name=job.name))
