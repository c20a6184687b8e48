from __future__ import annotations

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from jest_server.domain.errors import ReferenceModelError
from jest_server.domain.references import ReferenceInfo, ReferenceInput
from jest_server.reference.config import reference_info

GOOD = """
name: "m" platform: "ensemble" max_batch_size: 8
input [
  { name: "image" data_type: TYPE_UINT8 dims: [ 3, 4, 4 ] },
  { name: "tokens" data_type: TYPE_INT32 dims: [ -1 ] }
]
output [
  { name: "image_embedding" data_type: TYPE_FP32 dims: [ 5 ] },
  { name: "text_embedding" data_type: TYPE_FP32 dims: [ 5 ] }
]
parameters { key: "jest_scale" value: { string_value: "12.5" } }
parameters { key: "jest_bias" value: { string_value: "-10" } }
parameters { key: "jest_version" value: { string_value: "v1" } }
parameters { key: "jest_preprocessing_id" value: { string_value: "p1" } }
"""


def parsed(text):
    return text_format.Parse(text, pb.ModelConfig())


def test_everything_that_selection_needs_is_read():
    assert reference_info(parsed(GOOD)) == ReferenceInfo(
        name="m",
        version="v1",
        preprocessing_id="p1",
        scale=12.5,
        bias=-10.0,
        embedding_width=5,
        inputs=(
            ReferenceInput(name="image", datatype="UINT8", shape=(3, 4, 4)),
            ReferenceInput(name="tokens", datatype="INT32", shape=(-1,)),
        ),
    )


@pytest.mark.parametrize("name", ["jest_scale", "jest_bias", "jest_version", "jest_preprocessing_id"])
def test_a_missing_parameter_is_named_with_the_model(name):
    config = parsed(GOOD)
    del config.parameters[name]
    with pytest.raises(ReferenceModelError, match=f"^model m: parameter {name} is missing or empty, expected"):
        reference_info(config)


@pytest.mark.parametrize("name", ["jest_scale", "jest_bias", "jest_version", "jest_preprocessing_id"])
def test_an_empty_parameter_is_as_good_as_none(name):
    config = parsed(GOOD)
    config.parameters[name].string_value = ""
    with pytest.raises(ReferenceModelError, match=f"parameter {name} is missing or empty"):
        reference_info(config)


@pytest.mark.parametrize("value", ["ten", "nan", "inf"])
@pytest.mark.parametrize("name", ["jest_scale", "jest_bias"])
def test_a_parameter_that_is_no_finite_number_is_told(name, value):
    config = parsed(GOOD)
    config.parameters[name].string_value = value
    with pytest.raises(ReferenceModelError, match=f"parameter {name} is '{value}', expected a finite number"):
        reference_info(config)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("max_batch_size: 8", "max_batch_size: 0", "max_batch_size is 0, expected at least 1"),
        ("TYPE_INT32", "TYPE_STRING", "input tokens data_type is STRING, expected one of FP32"),
        ('"text_embedding"', '"text"', "output is image_embedding, text, expected image_embedding, text_embedding"),
        (
            "TYPE_FP32 dims: [ 5 ] },",
            "TYPE_FP16 dims: [ 5 ] },",
            r"image_embedding is TYPE_FP16 \[5\], expected TYPE_FP32",
        ),
        ("dims: [ 5 ] },", "dims: [ 5, 5 ] },", r"output image_embedding is TYPE_FP32 \[5, 5\], expected"),
        ("dims: [ 5 ] },", "dims: [ 6 ] },", r"embedding widths is \[6, 5\], expected two equal ones"),
    ],
)
def test_what_a_reference_model_cannot_have_is_told(old, new, problem):
    assert old in GOOD
    with pytest.raises(ReferenceModelError, match=f"^model m: .*{problem}"):
        reference_info(parsed(GOOD.replace(old, new, 1)))


def test_a_model_without_inputs_is_told():
    config = parsed(GOOD)
    del config.input[:]
    with pytest.raises(ReferenceModelError, match="input is empty, expected at least one"):
        reference_info(config)


def test_a_wrong_configuration_can_be_put_right_by_whoever_serves_it():
    with pytest.raises(ReferenceModelError) as caught:
        reference_info(parsed(GOOD.replace("max_batch_size: 8", "")))
    assert caught.value.retryable
