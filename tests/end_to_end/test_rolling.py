"""From one version of the reference model to the next while a job runs: two Tritons and two scorers, side by side."""

from __future__ import annotations

import asyncio
import shutil

import grpc
import pytest

from conformance.speaker import Speaker, features, fresh_keys, refusal_of, unit_embeddings
from jest_bench.scoring_stack import ScoringStack
from jest_proto.v1 import jobs_pb2
from jest_server.local.jest_process import JestProcess
from jest_server.local.triton_server import TritonServer
from jest_server.reference.config import reference_info
from jest_server.reference.repository import read_config
from jest_server.stores.redis.stores import open_redis_stores
from support.polling import wait_until

pytestmark = pytest.mark.skipif(TritonServer.available() is not None, reason=str(TritonServer.available()))

ROWS = 32


@pytest.fixture
def newer(stack_repository, tmp_path):
    """The same model under another version, as its operators would call other weights."""
    repository = tmp_path / "new"
    shutil.copytree(stack_repository, repository)
    config = repository / "jest_reference" / "config.pbtxt"
    config.write_text(config.read_text().replace(version_of(stack_repository), "another-version"))
    return repository


def version_of(repository):
    return reference_info(read_config(repository, "jest_reference")).version


def test_new_super_batches_take_the_new_version_and_old_ones_end_with_the_old(stack_repository, newer, tmp_path):
    old, new = version_of(stack_repository), version_of(newer)
    assert (new, old == new) == ("another-version", False)
    with ScoringStack(stack_repository, scorers=1, settings={"announce_interval_s": 0.3}) as stack:
        speaker = Speaker(stack.address, "jest_reference")
        job, keys = speaker.create_job(), fresh_keys(ROWS)
        name = job.spec.name
        assert speaker.walk(job, "before", keys).reference_version == old
        pinned = fresh_keys(ROWS)
        missing = list(speaker.submit(name, "pinned", pinned).missing_positions)

        triton = TritonServer(newer, tmp_path / "newer")
        settings = {"queue_url": stack.queue_url, "cache_url": stack.cache_url}
        triton.start()
        settings |= {"triton_url": triton.grpc_url, "consumer": "newer", "announce_interval_s": 0.3, "drain_delay_s": 0}
        scorer = JestProcess("newer", "jest_server.scorer", tmp_path / "newer.log", settings)
        scorer.start()
        try:
            wait_until(lambda: served(stack.queue_url) == new)
            # The same examples again: what the old version made of them is not used.
            answer = speaker.walk(job, "after", keys)
            assert (answer.reference_version, answer.reference_inferences) == (new, ROWS)
            # Submitted before: uploaded, scored and selected with the version that it began with.
            speaker.upload(name, "pinned", missing, features(job, [pinned[p] for p in missing]))
            answer = speaker.select(name, "pinned", unit_embeddings(ROWS, seed=1))
            assert (answer.reference_version, answer.reference_inferences) == (old, ROWS)

            stack.scorers[0].stop()
            assert speaker.walk(job, "old-gone", fresh_keys(ROWS)).reference_version == new
            # And back: the old version is the newest that is served again.
            stack.scorers[0].start()
            scorer.stop()
            wait_until(lambda: served(stack.queue_url) == old)
            answer = speaker.walk(job, "back", keys)
            assert (answer.reference_version, answer.cache_hits) == (old, ROWS)
            counters = speaker.jobs.GetJob(jobs_pb2.GetJobRequest(name=name)).job.counters
            assert (counters.submitted, counters.selected, counters.dead_lettered) == (5, 5, 0)
        finally:
            scorer.stop()
            triton.kill()
            speaker.close()


def served(queue_url):
    """The version that new super-batches get."""

    async def ask():
        stores = open_redis_stores(queue_url)
        try:
            return await stores.jobs.get_reference("jest_reference")
        finally:
            await stores.connection.close()

    found = asyncio.run(ask())
    return None if found is None else found.version


def test_a_model_that_nobody_serves_is_told_and_others_go_on(stack_repository):
    with ScoringStack(stack_repository, scorers=1) as stack:
        speaker = Speaker(stack.address, "jest_reference")
        with pytest.raises(grpc.RpcError) as caught:
            speaker.create_job(reference_model="another")
        assert refusal_of(caught.value).reason == "REFERENCE_UNAVAILABLE"
        assert len(speaker.walk(speaker.create_job(), "sb", fresh_keys(ROWS)).positions) == ROWS // 4
        speaker.close()
