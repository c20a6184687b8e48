"""Whatever Triton answers becomes embeddings or a ReferenceModelError, and is counted."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from tritonclient.grpc import model_config_pb2, service_pb2

from jest_server.domain.errors import ReferenceModelError
from jest_server.domain.inference import Outcome
from jest_server.reference.triton import TritonReferenceModel, TritonSettings
from support.fake_triton import WIDTH, FakeTriton, fake_triton, good_answer, good_config, response_of
from support.malformed_answers import MALFORMED

EXAMPLES = {"x": np.array([[1], [2]], np.int64)}


def connect(fake: FakeTriton, seen: list, **fields) -> TritonReferenceModel:
    return TritonReferenceModel(
        TritonSettings(fake.url, model="ref", retries=0, timeout_s=5.0, **fields),
        on_inference=lambda *observed: seen.append(observed[2]),
    )


@pytest.fixture
async def fake():
    async with fake_triton() as fake:
        yield fake


@pytest.fixture
def seen():
    return []


@pytest.fixture
async def model(fake, seen):
    model = connect(fake, seen)
    await model.info()
    yield model
    await model.close()


async def test_a_well_formed_answer_becomes_embeddings(model, seen):
    embeddings = await model.embed(EXAMPLES)
    np.testing.assert_allclose(embeddings[:, 0, 0], np.cos([1, 2]), rtol=1e-6)
    assert seen == [Outcome.OK]


async def test_outputs_may_come_in_any_order_beside_others(model, fake):
    def shuffled(request):
        image, text = (np.frombuffer(raw, "<f4").reshape(2, WIDTH) for raw in good_answer(request).raw_output_contents)
        return response_of(text, np.ones((7, 1)), image, names=("text_embedding", "other", "image_embedding"))

    expected = await model.embed(EXAMPLES)
    fake.answer = shuffled
    np.testing.assert_array_equal(await model.embed(EXAMPLES), expected)


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_answer_is_an_error_that_says_what_is_wrong(model, fake, seen, name):
    fake.answer, problem = MALFORMED[name]
    with pytest.raises(ReferenceModelError, match=problem) as caught:
        await model.embed(EXAMPLES)
    assert caught.value.retryable
    assert seen == [Outcome.BROKEN_OUTPUT]
    assert not await model.ready()
    fake.answer = good_answer
    assert await model.ready()


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_every_status_is_an_error_with_a_short_message(model, fake, seen, code):
    fake.status = code, "words " * 400
    with pytest.raises(ReferenceModelError, match=code.name) as caught:
        await model.embed(EXAMPLES)
    assert len(str(caught.value)) < 700
    assert caught.value.retryable == (code is not grpc.StatusCode.INVALID_ARGUMENT)
    assert len(seen) == 1


def changed_config(**changes):
    answer = good_config()
    for name, value in changes.items():
        setattr(answer.config, name, value)
    return answer


def config_of_input(**fields):
    answer = good_config()
    del answer.config.input[:]
    answer.config.input.add(**{"name": "x", "data_type": model_config_pb2.TYPE_INT64, "dims": [1]} | fields)
    return answer


def config_of_width(width):
    answer = good_config()
    for output in answer.config.output:
        output.dims[:] = [width]
    return answer


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (b"\xff\xff\xff", "the answer is no message of its protocol"),
        (b"", "the configuration is of ''"),
        (changed_config(name="other"), "the configuration is of 'other'"),
        (changed_config(max_batch_size=-5), "max_batch_size is -5"),
        (
            config_of_width(2**62),
            r"output image_embedding is TYPE_FP32 \[4611686018427387904\], expected TYPE_FP32 \[D\]",
        ),
        (config_of_input(dims=[2**62]), r"input x dims is \[4611686018427387904\]"),
        (config_of_input(dims=[2**40, 2**40]), "input x dims"),
        (config_of_input(dims=[0]), r"input x dims is \[0\]"),
        (config_of_input(dims=[-7]), r"input x dims is \[-7\]"),
        (config_of_input(dims=[1] * 30_000), "input x dims"),
        (config_of_input(name="x" * 1000), "length of an input's name is 1000"),
    ],
)
async def test_a_configuration_that_no_model_can_have_is_an_error(model, fake, config, problem):
    fake.config = config
    assert not await model.ready()
    with pytest.raises(ReferenceModelError, match=problem) as caught:
        await model.info()
    assert caught.value.retryable
    assert len(str(caught.value)) < 700


async def test_an_unknown_datatype_of_a_newer_triton_is_an_error(model, fake):
    answer = config_of_input()
    fake.config = answer.SerializeToString().replace(bytes([0x10, model_config_pb2.TYPE_INT64]), bytes([0x10, 99]))
    with pytest.raises(ReferenceModelError, match="input x data_type is 99, expected one of"):
        await model.info()


TENSORS = strategies.builds(
    service_pb2.ModelInferResponse.InferOutputTensor,
    name=strategies.sampled_from(["image_embedding", "text_embedding", "", "other"]),
    datatype=strategies.sampled_from(["FP32", "FP16", "BYTES", "INT64", "BF16", "BOOL", "", "nonsense"]),
    shape=strategies.lists(strategies.sampled_from([2, WIDTH, 0, -1, 2**62]), max_size=3),
)
RESPONSES = strategies.builds(
    service_pb2.ModelInferResponse,
    outputs=strategies.lists(TENSORS, max_size=4),
    raw_output_contents=strategies.lists(
        strategies.one_of(strategies.binary(max_size=40), strategies.binary(min_size=32, max_size=32)), max_size=4
    ),
)


@given(answers=strategies.lists(strategies.one_of(RESPONSES, strategies.binary(max_size=60)), min_size=20, max_size=20))
@settings(max_examples=50)
def test_any_answer_is_finite_embeddings_or_a_reference_model_error(answers):
    async def ask():
        async with fake_triton() as fake:
            model = connect(fake, [])
            for answer in answers:
                fake.answer = lambda _, answer=answer: answer
                try:
                    embeddings = await model.embed(EXAMPLES)
                except ReferenceModelError:
                    continue
                assert embeddings.shape == (2, 2, WIDTH)
                assert np.isfinite(embeddings.astype(np.float16)).all()
            await model.close()

    asyncio.run(ask())
