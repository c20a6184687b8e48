from __future__ import annotations

import asyncio
import shutil

import numpy as np
import pytest

from jest_server.domain.errors import ReferenceModelError
from jest_server.domain.inference import Outcome
from jest_server.reference.in_process import InProcessReferenceModel
from support.references import put_in_mood, tiny_examples
from support.tiny_towers import VOCABULARY, WIDTH, Mood


@pytest.fixture
def seen():
    return []


@pytest.fixture
async def model(reference_repository, seen):
    model = InProcessReferenceModel(
        reference_repository, microbatch=8, on_inference=lambda *observed: seen.append(observed)
    )
    yield model
    await model.close()


async def test_it_tells_what_the_configuration_says(model):
    info = await model.info()
    assert (info.name, info.scale, info.bias, info.embedding_width) == ("jest_reference", 10.0, -10.0, WIDTH)


async def test_an_embedding_does_not_depend_on_how_the_examples_were_cut(model):
    examples = tiny_examples(19)
    together = await model.embed(examples)
    alone = await model.embed({name: array[17:18] for name, array in examples.items()})
    np.testing.assert_allclose(together[17:18], alone, atol=1e-6)


async def test_examples_are_cut_into_microbatches_and_observed(model, seen):
    await model.embed(tiny_examples(19))
    assert [(examples, outcome) for examples, _, outcome in seen] == [(8, "ok"), (8, "ok"), (3, "ok")]


async def test_no_examples_make_no_inference(model, seen):
    assert (await model.embed(tiny_examples(0))).shape == (0, 2, WIDTH)
    assert not seen


async def test_calls_at_the_same_time_get_their_own_answers(model):
    calls = [tiny_examples(5, seed=seed) for seed in range(4)]
    together = await asyncio.gather(*(model.embed(call) for call in calls))
    for call, answer in zip(calls, together, strict=True):
        np.testing.assert_array_equal(answer, await model.embed(call))


async def test_inputs_of_a_wrong_kind_are_refused_for_good(model):
    with pytest.raises(ReferenceModelError, match="datatype of input tokens: int64, expected int32") as caught:
        await model.embed(tiny_examples(2) | {"tokens": np.zeros((2, 6), np.int64)})
    assert not caught.value.retryable


async def test_values_that_the_tower_cannot_take_are_refused_for_good(model, seen):
    examples = tiny_examples(2)
    examples["tokens"][1, 0] = VOCABULARY
    with pytest.raises(ReferenceModelError, match="IndexError") as caught:
        await model.embed(examples)
    assert not caught.value.retryable
    assert [outcome for *_, outcome in seen] == [Outcome.REFUSED]


@pytest.mark.parametrize(
    ("mood", "problem", "outcome"),
    [
        (Mood.NAN, "image_embedding has NaN or infinity in 2 of 2 rows", Outcome.BROKEN_OUTPUT),
        (Mood.HUGE, "image_embedding has values beyond float16 in 2 of 2 rows", Outcome.BROKEN_OUTPUT),
        (Mood.ZERO, "image_embedding has norms outside 0.01 to 1000 in 2 of 2 rows", Outcome.BROKEN_OUTPUT),
        (Mood.WRONG_WIDTH, r"image_embedding is float32 \[2, 11\], expected float32 \[2, 12\]", Outcome.BROKEN_OUTPUT),
        (Mood.RAISE, "RuntimeError: cannot read", Outcome.FAILED),
    ],
)
async def test_a_tower_that_fails_is_told_and_may_be_put_right(model, seen, mood, problem, outcome):
    with pytest.raises(ReferenceModelError, match=problem) as caught:
        await model.embed(put_in_mood(tiny_examples(2), 0, mood))
    assert caught.value.retryable
    assert [observed for *_, observed in seen] == [outcome]


async def test_a_model_that_embeds_is_ready(model):
    assert await model.ready()


async def test_a_repository_that_cannot_be_used_is_not_ready_until_it_can(reference_repository, tmp_path):
    model = InProcessReferenceModel(tmp_path / "repository")
    assert not await model.ready()
    shutil.copytree(reference_repository, tmp_path / "repository")
    assert await model.ready()
    await model.close()
