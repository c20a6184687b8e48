import asyncio

import numpy as np
import pytest

from jest_server.domain.errors import ReferenceModelError
from jest_server.domain.storage import Lease
from jest_server.domain.super_batches import SuperBatchRef

WIDTH = 4


async def test_a_shard_becomes_embeddings_image_before_text(bench):
    async with bench.working():
        result = await bench.scored(await bench.queue(["a", "b"], values=[5, 7]))
    assert result.keys == ("a", "b")
    assert result.inferred == 2
    embeddings = np.frombuffer(result.embeddings, np.float16).reshape(2, 2, WIDTH)
    assert embeddings[:, 0, 0].tolist() == embeddings[:, 1, 1].tolist() == [5, 7]


async def test_what_another_shard_had_computed_is_not_computed_again(bench):
    async with bench.working(concurrent_shards=1):
        first = await bench.scored(await bench.queue(["a", "b"], values=[1, 2]))
        second = await bench.scored(await bench.queue(["b", "c"], values=[2, 3]))
    assert sorted(bench.model.embedded) == [1, 2, 3]
    assert (first.inferred, second.inferred) == (2, 1)
    width = 2 * 2 * WIDTH
    assert second.embeddings[:width] == first.embeddings[width:]


async def test_equal_keys_in_one_shard_are_computed_once(bench):
    async with bench.working():
        result = await bench.scored(await bench.queue(["a", "b", "a"], values=[1, 2, 1]))
    assert result.keys == ("a", "b")
    assert bench.model.embedded == [1, 2]


async def test_workers_that_want_the_same_at_the_same_moment_compute_it_once(bench):
    bench.model.gate.clear()
    async with bench.working(), bench.working() as second:
        ids = [await bench.queue(["a", "b", f"own-{i}"], values=[1, 2, 10 + i]) for i in range(12)]
        await until_true(lambda: len(second._in_hand) == 2)
        bench.model.gate.set()
        results = [await bench.scored(super_batch_id) for super_batch_id in ids]
    assert sorted(bench.model.embedded) == [1, 2, *range(10, 22)]
    assert sum(result.inferred for result in results) == 14
    size = 2 * 2 * WIDTH
    assert len({result.embeddings[: 2 * size] for result in results}) == 1


async def test_shards_that_wait_for_others_keep_no_slot(bench):
    """One slot: were it kept by the shard that waits, nobody would score the third one."""
    info = await bench.model.info()
    await bench.cache.take(info, ["a"], owner="elsewhere", ttl_s=60)
    async with bench.working(concurrent_shards=1):
        waiting = await bench.queue(["a", "b"], values=[1, 2])
        await bench.scored(await bench.queue(["c"], values=[3]))
        assert await bench.stores.super_batches.get_results(SuperBatchRef(bench.job, waiting)) == []
        assert sorted(bench.model.embedded) == [2, 3]
        await bench.cache.put(info, {"a": bytes(info.value_bytes)})
        assert (await bench.scored(waiting)).inferred == 1


async def test_a_worker_holds_a_limited_number_of_waiting_shards(bench):
    info = await bench.model.info()
    await bench.cache.take(info, ["a"], owner="elsewhere", ttl_s=60)
    async with bench.working(concurrent_shards=1) as worker:
        for _ in range(12):
            await bench.queue(["a"])
        await until_true(lambda: len(worker._in_hand) == 8)
        await asyncio.sleep(0.3)
        assert len(worker._in_hand) == 8
        await bench.cache.release_leases(info, ["a"], owner="elsewhere")
        await until_true(lambda: not worker._in_hand)
    assert bench.model.embedded == [0]


async def test_what_a_dead_scorer_had_begun_is_computed_by_who_waits(bench):
    info = await bench.model.info()
    await bench.cache.take(info, ["a"], owner="dies", ttl_s=0.5)
    async with bench.working():
        assert (await bench.scored(await bench.queue(["a"]))).inferred == 1


async def test_a_slow_inference_keeps_its_leases(bench):
    bench.model.gate.clear()
    info = await bench.model.info()
    async with bench.working(inference_lease_s=0.5) as worker:
        super_batch_id = await bench.queue(["a"])
        await until_true(lambda: worker._in_hand)
        await asyncio.sleep(1.5)
        assert await bench.cache.take(info, ["a"], owner="greedy", ttl_s=1) == [Lease.OTHERS]
        bench.model.gate.set()
        await bench.scored(super_batch_id)
    assert await bench.cache.take(info, ["b"], owner="greedy", ttl_s=1) == [Lease.MINE]


async def test_an_inference_that_fails_leaves_its_examples_to_others(bench):
    bench.model.errors = [ReferenceModelError("bad pixels", retryable=False)]
    async with bench.working(inference_lease_s=60):
        await bench.dead(await bench.queue(["a"]))
        await bench.scored(await bench.queue(["a"]))


async def test_a_model_that_goes_away_costs_no_shard(bench):
    async with bench.working():
        await bench.scored(await bench.queue(["a"]))
        bench.model.is_ready = False
        waiting = [await bench.queue([f"k{i}"]) for i in range(4)]
        await asyncio.sleep(0.5)
        assert [await bench.stores.super_batches.get_results(SuperBatchRef(bench.job, sb)) for sb in waiting] == [
            []
        ] * 4
        bench.model.is_ready = True
        for super_batch_id in waiting:
            await bench.scored(super_batch_id)
    counters = await bench.stores.jobs.counters(bench.job)
    assert (counters.dead_lettered, counters.in_flight) == (0, 5)


async def test_a_passing_failure_is_tried_again(bench):
    bench.model.errors = [ReferenceModelError("hiccup", retryable=True)] * 2
    async with bench.working(max_attempts=3):
        assert (await bench.scored(await bench.queue(["a"]))).inferred == 1


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ([ReferenceModelError("bad pixels", retryable=False)], "INFERENCE_REFUSED"),
        ([ReferenceModelError("boom", retryable=True)] * 3, "INFERENCE_FAILED"),
    ],
)
async def test_a_shard_that_fails_while_the_model_works_is_dead_lettered_alone(bench, errors, reason):
    async with bench.working(max_attempts=3, concurrent_shards=1):
        bench.model.errors = list(errors)
        bad = await bench.queue(["a"])
        letter = await bench.dead(bad)
        await bench.scored(await bench.queue(["b"]))
    assert letter.reason == reason
    assert str(errors[0]) in letter.detail
    counters = await bench.stores.jobs.counters(bench.job)
    assert (counters.submitted, counters.dead_lettered, counters.in_flight) == (2, 1, 1)


async def test_shards_for_another_version_are_left_to_who_serves_it(bench):
    async with bench.working():
        older = await bench.queue(["a"], version="older")
        await bench.scored(await bench.queue(["b"]))
        assert await bench.stores.super_batches.get_results(SuperBatchRef(bench.job, older)) == []
    assert await bench.stores.queue.depth() == 1


async def test_a_shard_in_hand_whose_version_is_gone_is_dead_lettered(bench):
    bench.model.gate.clear()
    async with bench.working() as worker:
        super_batch_id = await bench.queue(["a"])
        await until_true(lambda: worker._in_hand)
        before = bench.model.version
        bench.model.is_ready = False
        bench.model.gate.set()
        await until_true(lambda: not worker.ready)
        bench.model.version, bench.model.is_ready = "newer", True
        letter = await bench.dead(super_batch_id)
    assert letter.reason == "REFERENCE_CHANGED"
    assert f"{before!r}, served is ('ref', 'newer')" in letter.detail
    assert not bench.model.embedded


async def test_features_that_cannot_be_read_are_dead_lettered(bench):
    async with bench.working():
        letter = await bench.dead(await bench.queue(["a"], features=b'{"tensors":[{"name":"x"}]}\n'))
    assert letter.reason == "FEATURES_UNREADABLE"


async def test_what_is_unfinished_at_the_end_is_given_back_at_once(bench):
    bench.model.gate.clear()
    async with bench.working(consumer="leaves", reclaim_idle_s=60) as worker:
        super_batch_id = await bench.queue(["a"])
        await until_true(lambda: worker._in_hand)
    bench.model.gate.set()
    async with bench.working(reclaim_idle_s=60):
        assert (await bench.scored(super_batch_id)).inferred == 1


async def test_a_shard_of_a_silent_scorer_is_taken_over(bench):
    super_batch_id = await bench.queue(["a"])
    (claim,) = await bench.stores.queue.claim("silent", await bench.model.info(), count=1, block_s=1)
    assert claim.shard.super_batch_id == super_batch_id
    async with bench.working(reclaim_idle_s=0.3):
        await bench.scored(super_batch_id)


async def test_a_scorer_that_is_slow_but_alive_keeps_its_shard(bench):
    bench.model.gate.clear()
    async with bench.working(reclaim_idle_s=1.0):
        super_batch_id = await bench.queue(["a"])
        await asyncio.sleep(1.5)
        assert await bench.stores.queue.reclaim("greedy", await bench.model.info(), idle_s=1.0, count=1) == []
        bench.model.gate.set()
        await bench.scored(super_batch_id)


async def test_a_shard_that_outlives_too_many_scorers_is_dead_lettered(bench):
    super_batch_id = await bench.queue(["a"])
    await bench.stores.queue.claim("dies-0", await bench.model.info(), count=1, block_s=1)
    for i in range(1, 3):
        await bench.stores.queue.reclaim(f"dies-{i}", await bench.model.info(), idle_s=0, count=100)
    async with bench.working(max_deliveries=3, reclaim_idle_s=0.1):
        letter = await bench.dead(super_batch_id)
    assert letter.reason == "TOO_MANY_DELIVERIES"
    assert not bench.model.embedded


async def until_true(look):
    async with asyncio.timeout(10):
        while not look():
            await asyncio.sleep(0.01)
