from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from jest_server.domain.errors import ReferenceModelError
from jest_server.domain.inference import Outcome
from jest_server.local.process import free_port
from jest_server.reference.in_process import InProcessReferenceModel
from jest_server.reference.repository import LoadedReference
from jest_server.reference.triton import TritonReferenceModel, TritonSettings
from support import slow_model
from support.polling import wait_for, within
from support.references import export_slow_model, put_in_mood, tiny_examples
from support.servers import triton_on
from support.tiny_towers import NAP_S, SECRET, VOCABULARY, WIDTH, Mood


@pytest.fixture
def seen():
    return []


@pytest.fixture
async def connect(triton, seen):
    """Makes models on the shared Triton, or on another; they are closed at the end."""
    models = []

    def make(*, url=triton.grpc_url, **settings):
        models.append(
            TritonReferenceModel(TritonSettings(url, **settings), on_inference=lambda *observed: seen.append(observed))
        )
        return models[-1]

    yield make
    for model in models:
        await model.close()


@pytest.fixture
def restarted(triton):
    """Leaves Triton as a test that breaks it found it."""
    yield
    triton.restart()


def count_outcomes(seen):
    return Counter(outcome for *_, outcome in seen)


async def test_it_tells_what_the_configuration_says(connect, reference_repository):
    assert await connect().info() == LoadedReference(reference_repository, "jest_reference").info


@pytest.mark.parametrize("count", [1, 64, 150])
async def test_embeddings_are_those_of_the_in_process_model(connect, reference_repository, count):
    examples = tiny_examples(count)
    local = InProcessReferenceModel(reference_repository)
    np.testing.assert_allclose(await connect().embed(examples), await local.embed(examples), atol=1e-5)
    await local.close()


async def test_examples_are_cut_into_microbatches(connect, seen):
    await connect(microbatch=20).embed(tiny_examples(50))
    assert sorted(examples for examples, *_ in seen) == [10, 20, 20]


async def test_the_models_own_batch_limit_goes_before_the_setting(connect, seen):
    await connect(microbatch=1000).embed(tiny_examples(130))
    assert sorted(examples for examples, *_ in seen) == [2, 64, 64]


async def test_no_examples_make_no_inference(connect, seen):
    assert (await connect().embed(tiny_examples(0))).shape == (0, 2, WIDTH)
    assert not seen


async def test_all_calls_together_stay_within_the_concurrency(connect, monkeypatch):
    model = connect(microbatch=1, concurrency=3)
    infer, running, most = model._client.infer, 0, 0

    async def counted(*args, **kwargs):
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await infer(*args, **kwargs)
        finally:
            running -= 1

    monkeypatch.setattr(model._client, "infer", counted)
    await asyncio.gather(*(model.embed(tiny_examples(10)) for _ in range(3)))
    assert most == 3


async def test_a_burst_is_not_left_waiting_in_triton(connect):
    """Guards the encoders' configuration: with a queue policy, such bursts stall for half a second at a time."""
    model = connect(microbatch=64, concurrency=4)
    await model.embed(tiny_examples(512))
    with within(4):
        for _ in range(10):
            await model.embed(tiny_examples(512))


async def test_captions_of_different_lengths_do_not_disturb_each_other(connect):
    model = connect(microbatch=1, concurrency=16)
    calls = [tiny_examples(2, seed=length, length=length) for length in (1, 3, 6, 9)]
    alone = [await model.embed(call) for call in calls]
    together = await asyncio.gather(*(model.embed(call) for call in calls))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tokens": np.zeros((2, 6), np.int64)}, "datatype of input tokens: int64, expected int32"),
        ({"image": np.zeros((2, 3, 9, 9), np.uint8)}, "shape of input image"),
        ({"tokens": np.zeros((3, 6), np.int32)}, "examples of the inputs"),
        ({"mask": np.zeros((2, 6), np.int32)}, "inputs: "),
    ],
)
async def test_inputs_of_a_wrong_kind_are_refused_before_triton_sees_them(connect, seen, changes, problem):
    with pytest.raises(ReferenceModelError, match=problem) as caught:
        await connect().embed(tiny_examples(2) | changes)
    assert not caught.value.retryable
    assert not seen


async def test_values_that_the_tower_cannot_take_are_refused_for_good_without_repetition(connect, seen):
    examples = tiny_examples(2)
    examples["tokens"][1, 0] = VOCABULARY
    with pytest.raises(ReferenceModelError, match="IndexError: the tower refuses these values") as caught:
        await connect().embed(examples)
    assert not caught.value.retryable
    assert count_outcomes(seen) == {Outcome.REFUSED: 1}


@pytest.mark.parametrize(
    ("mood", "problem", "outcome"),
    [
        (Mood.NAN, "image_embedding has NaN or infinity in 2 of 2 rows", Outcome.BROKEN_OUTPUT),
        (Mood.HUGE, "image_embedding has values beyond float16 in 2 of 2 rows", Outcome.BROKEN_OUTPUT),
        (Mood.ZERO, "image_embedding has norms outside 0.01 to 1000 in 2 of 2 rows", Outcome.BROKEN_OUTPUT),
        (Mood.WRONG_WIDTH, r"image_embedding is float32 \[2, 11\], expected float32 \[2, 12\]", Outcome.BROKEN_OUTPUT),
        (Mood.RAISE, "RuntimeError in the tower; Triton's log tells more", Outcome.FAILED),
    ],
)
async def test_a_tower_that_fails_is_told_and_may_be_put_right(connect, seen, mood, problem, outcome):
    with pytest.raises(ReferenceModelError, match=problem) as caught:
        await connect().embed(put_in_mood(tiny_examples(2), 0, mood))
    assert caught.value.retryable
    assert count_outcomes(seen) == {outcome: 1}


async def test_a_towers_own_words_stay_in_tritons_log(connect):
    with pytest.raises(ReferenceModelError) as caught:
        await connect().embed(put_in_mood(tiny_examples(2), 0, Mood.RAISE))
    assert SECRET not in str(caught.value)
    assert "/" not in str(caught.value).split("StatusCode")[1]


async def test_a_bad_request_does_not_fail_those_that_triton_runs_with_it(connect):
    model = connect(microbatch=1, concurrency=16)
    busy = asyncio.create_task(model.embed(put_in_mood(tiny_examples(1), 0, Mood.SLOW)))
    await asyncio.sleep(NAP_S / 5)  # what is sent during the nap waits, and is run as one batch after it
    calls = [model.embed(tiny_examples(1, seed=seed)) for seed in range(6)]
    calls.append(model.embed(put_in_mood(tiny_examples(1), 0, Mood.RAISE)))
    *good, bad = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(bad, ReferenceModelError)
    for seed, embedding in enumerate(good):
        np.testing.assert_allclose(embedding, await model.embed(tiny_examples(1, seed=seed)), atol=1e-6)
    await busy


@pytest.fixture(scope="module")
def bounded_triton(tmp_path_factory):
    """Serves a reference model that takes its time and lets one request wait."""
    repository = tmp_path_factory.mktemp("bounded")
    export_slow_model(repository)
    with triton_on(repository, tmp_path_factory.mktemp("bounded-work")) as server:
        yield server


async def test_a_full_queue_is_waited_for_not_surfaced(connect, seen, bounded_triton):
    model = connect(url=bounded_triton.grpc_url, model=slow_model.NAME, microbatch=1, concurrency=6, retries=20)
    examples = {"number": np.arange(1, 7, dtype=np.float32).reshape(6, 1)}
    np.testing.assert_array_equal((await model.embed(examples))[:, 0], examples["number"])
    outcomes = count_outcomes(seen)
    assert outcomes[Outcome.BUSY] > 0
    assert outcomes[Outcome.OK] == 6


async def test_a_model_that_is_busy_is_ready_all_the_same(connect, seen, bounded_triton):
    url = bounded_triton.grpc_url
    model = connect(url=url, model=slow_model.NAME, microbatch=1, concurrency=6, retries=20)
    embedding = asyncio.create_task(model.embed({"number": np.ones((6, 1), np.float32)}))
    while Outcome.BUSY not in count_outcomes(seen):
        await asyncio.sleep(0.01)
    assert await connect(url=url, model=slow_model.NAME, retries=20, ready_timeout_s=10).ready()
    await embedding


async def test_a_request_past_its_deadline_is_given_up(connect, seen):
    with pytest.raises(ReferenceModelError, match="DEADLINE_EXCEEDED") as caught:
        await connect(timeout_s=NAP_S / 2).embed(put_in_mood(tiny_examples(1), 0, Mood.SLOW))
    assert caught.value.retryable
    assert count_outcomes(seen) == {Outcome.TIMEOUT: 1}


async def test_embeddings_of_another_model_than_was_announced_are_not_handed_out(connect):
    model = connect()
    await model.info()
    model._served = replace(model._served, info=model._served.info.model_copy(update={"version": "earlier"}))
    with pytest.raises(ReferenceModelError, match="jest_reference changed from version earlier to ") as caught:
        await model.embed(tiny_examples(1))
    assert caught.value.retryable


async def test_a_model_that_embeds_is_ready(connect):
    assert await connect().ready()


async def test_a_model_that_triton_does_not_serve_is_told(connect):
    model = connect(model="no_such_model")
    assert not await model.ready()
    with pytest.raises(ReferenceModelError, match=r"model no_such_model at .*NOT_FOUND") as caught:
        await model.info()
    assert caught.value.retryable


async def test_a_model_that_is_no_reference_model_is_told(connect):
    model = connect(model="jest_image_encoder")
    with pytest.raises(ReferenceModelError, match="model jest_image_encoder: parameter jest_version is missing"):
        await model.info()


async def test_nobody_at_the_address_is_not_ready_at_once(connect):
    with within(1):
        assert not await connect(url=f"127.0.0.1:{free_port()}").ready()


async def test_a_model_whose_process_died_is_not_ready_though_triton_says_so(connect, triton, restarted):
    model = connect()
    with pytest.raises(ReferenceModelError) as caught:
        await model.embed(put_in_mood(tiny_examples(1), 0, Mood.DIE))
    assert caught.value.retryable
    assert await model._client.is_model_ready("jest_reference")
    assert not await model.ready()


async def test_a_triton_that_stands_still_is_not_ready_within_the_deadline(connect, triton):
    model = connect(ready_timeout_s=0.5)
    await wait_for(model.ready)
    os.kill(triton.pid, signal.SIGSTOP)
    try:
        with within(1.5):
            assert not await model.ready()
    finally:
        os.kill(triton.pid, signal.SIGCONT)
    await wait_for(model.ready)


async def test_a_triton_that_is_killed_and_comes_back_costs_time_only(connect, triton, seen):
    model = connect(microbatch=1, concurrency=2, retries=200)
    examples = tiny_examples(6)
    for row in range(6):
        put_in_mood(examples, row, Mood.SLOW)
    before = await model.embed(examples)
    seen.clear()
    embedding = asyncio.create_task(model.embed(examples))
    while not seen:  # with the first answer the next request has started, and takes its time
        await asyncio.sleep(0.01)
    triton.kill()
    await asyncio.to_thread(triton.start)
    np.testing.assert_allclose(await embedding, before, atol=1e-6)
    assert count_outcomes(seen)[Outcome.UNAVAILABLE] > 0
