import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from jest_core import Embeddings, ExampleLosses, PairLosses
from jest_core_samples import random_embeddings

ROWS = torch.ones(4, 3)


def poisoned(row: int, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    matrix = torch.ones(4, 3, dtype=dtype)
    matrix[row:, 1] = value
    return matrix


def test_the_length_is_the_number_of_rows():
    assert len(random_embeddings(7, seed=0, width=3)) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_kept_as_they_are(dtype):
    image = ROWS.to(dtype)
    assert Embeddings(image, image, 10.0, -10.0).image is image


def test_scale_and_bias_tensors_of_one_element_become_floats():
    scale = torch.tensor(2.5, requires_grad=True)
    embeddings = Embeddings(ROWS, ROWS, scale, torch.tensor([-1.5], dtype=torch.bfloat16))
    assert (embeddings.scale, embeddings.bias) == (2.5, -1.5)
    assert type(embeddings.scale) is type(embeddings.bias) is float


@pytest.mark.parametrize(
    "number",
    [
        5,
        5.0,
        Fraction(5),
        np.float32(5),
        np.float64(5),
        np.float16(5),
        np.int64(5),
        np.array(5.0),
        np.array([[5]]),
        torch.tensor(5),
        torch.tensor([5.0], dtype=torch.bfloat16),
        torch.nn.Parameter(torch.tensor(5.0)),
        torch.nn.Parameter(torch.ones(1)) * 5,
    ],
)
def test_scale_and_bias_may_be_any_real_number(number):
    embeddings = Embeddings(ROWS, ROWS, number, number)
    assert (embeddings.scale, embeddings.bias) == (5.0, 5.0)
    assert type(embeddings.scale) is type(embeddings.bias) is float


def test_a_bias_of_none_is_no_bias():
    assert Embeddings(ROWS, ROWS, 1.0, None).bias == 0.0


@pytest.mark.parametrize(
    ("image", "text", "wider"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_towers_of_different_precision_meet_in_the_wider_type(image, text, wider):
    embeddings = Embeddings(ROWS.to(image), ROWS.to(text), 1.0)
    assert embeddings.image.dtype == embeddings.text.dtype == wider
    assert embeddings.image.equal(ROWS.to(wider))


def test_distributed_tensors_are_gathered_unless_they_are_split_by_rows(tmp_path):
    program = Path(__file__).with_name("dtensor_rank.py")
    ranks = [
        subprocess.Popen([sys.executable, program, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for rank in ranks:
        plain, gathered, scale, bias, refused = json.loads(rank.communicate(timeout=60)[0])
        assert plain
        assert gathered == [torch.arange(8.0).reshape(2, 4).tolist()] * 3
        assert (scale, bias) == (10.0, -2.0)
        assert refused.startswith(
            "image is a DTensor split by rows over 2 ranks, expected this rank's rows: use image.to"
        )


class Output(NamedTuple):
    text_embeds: torch.Tensor
    image_embeds: torch.Tensor
    logits: torch.Tensor | None = None


TEXT = 2 * ROWS
OPEN_CLIP = {"image_features": ROWS, "text_features": TEXT, "logit_scale": torch.tensor(10.0)}


@pytest.mark.parametrize(
    ("outputs", "given", "bias"),
    [
        (OPEN_CLIP, {}, 0.0),
        (OPEN_CLIP | {"logit_bias": torch.tensor(-5.0)}, {}, -5.0),
        (OPEN_CLIP | {"logit_bias": None}, {}, 0.0),
        (OPEN_CLIP | {"logit_scale": 1.0}, {"scale": 10.0, "bias": -1.0}, -1.0),
        ({"image": ROWS, "text": TEXT, "scale": 10.0, "bias": -3.0}, {}, -3.0),
        (Output(TEXT, ROWS), {"scale": 10.0}, 0.0),
        (SimpleNamespace(image_embeds=ROWS, text_embeds=TEXT, loss=None), {"scale": 10.0, "bias": -5}, -5.0),
        ((ROWS, TEXT), {"scale": torch.tensor(10.0)}, 0.0),
        ((ROWS, TEXT, 10.0), {}, 0.0),
        ([ROWS, TEXT, 10.0, None], {}, 0.0),
        ((ROWS, TEXT, 10.0, torch.tensor(-5.0)), {}, -5.0),
    ],
)
def test_embeddings_are_found_in_what_a_model_returns(outputs, given, bias):
    embeddings = Embeddings.from_outputs(outputs, **given)
    assert embeddings.image is ROWS
    assert embeddings.text is TEXT
    assert (embeddings.scale, embeddings.bias) == (10.0, bias)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (
            {"image_embeds": ROWS, "text_embeds": TEXT},
            r"scale is not in the outputs \(dict with image_embeds, text_embeds\), .*; give it as scale=model.log",
        ),
        (
            {"loss": 1.0, "logits": ROWS},
            r"image is not in the outputs \(dict with loss, logits\), expected one of image_f",
        ),
        (
            {"image": ROWS, "scale": 1.0},
            r"text is not in the outputs .*, expected one of text_features, text_embeds, text",
        ),
        ((ROWS, TEXT), r"scale is not in the outputs \(tuple\)"),
        ((ROWS,), "outputs have 1 elements, expected image, text, scale and possibly bias"),
        ((ROWS,) * 6, r"outputs have 6 elements, .* call Embeddings\(image, text, scale, bias\)"),
        (ROWS, r"image is not in the outputs \(Tensor\)"),
        (OPEN_CLIP | {"logit_scale": "10"}, r"scale \('10'\) must be a number"),
    ],
)
def test_what_is_not_found_in_a_model_s_outputs_is_named(outputs, message):
    with pytest.raises(ValueError, match=message):
        Embeddings.from_outputs(outputs)


def test_moving_to_a_device_moves_both_tensors_and_keeps_the_rest():
    moved = random_embeddings(3, seed=0, scale=5.0, bias=-2.0).to(torch.device("cpu"))
    assert (moved.image.device.type, moved.text.device.type) == ("cpu", "cpu")
    assert (moved.scale, moved.bias) == (5.0, -2.0)


def test_embeddings_cannot_be_changed():
    with pytest.raises(AttributeError):
        random_embeddings(3, seed=0).scale = 3.0


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (torch.ones(4), ROWS, r"image must be a non-empty matrix \[B, D\], not of shape \[4\]"),
        (ROWS, torch.ones(2, 2, 2), r"text must be a non-empty matrix \[B, D\], not of shape \[2, 2, 2\]"),
        (torch.ones(0, 3), torch.ones(0, 3), r"image must be a non-empty matrix .* \[0, 3\]"),
        (ROWS, torch.ones(5, 3), r"image and text must have the same shape: \[4, 3\] and \[5, 3\]"),
        (ROWS, torch.ones(4, 2), r"image and text must have the same shape: \[4, 3\] and \[4, 2\]"),
        (ROWS, ROWS.to("meta"), "image and text must have the same device: cpu and meta"),
        (ROWS.long(), ROWS.long(), "image must have one of the dtypes float32, float16, bfloat16, not int64"),
        (ROWS.double(), ROWS.double(), "image must have one of the dtypes .* not float64"),
        ([[1.0]], ROWS, "image must be a tensor, not list"),
        (poisoned(2, float("nan")), ROWS, "image must be finite: row 2 holds NaN or Inf"),
        (ROWS, poisoned(1, float("inf")), "text must be finite: row 1 holds NaN or Inf"),
        (ROWS, poisoned(3, float("-inf")), "text must be finite: row 3 holds NaN or Inf"),
        (poisoned(0, float("nan"), torch.bfloat16), ROWS.bfloat16(), "image must be finite: row 0"),
        (poisoned(0, float("inf"), torch.float16), ROWS.half(), "image must be finite: row 0"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(image, text, message):
    with pytest.raises(ValueError, match=message):
        Embeddings(image, text, 1.0)


@pytest.mark.parametrize(
    ("scale", "bias", "message"),
    [
        (0.0, 0.0, r"scale \(0.0\) must be larger than 0"),
        (-1.0, 0.0, r"scale \(-1.0\) must be larger than 0"),
        (float("nan"), 0.0, r"scale \(nan\) must be finite"),
        (float("inf"), 0.0, r"scale \(inf\) must be finite"),
        (1.0, float("inf"), r"bias \(inf\) must be finite"),
        (1.0, torch.tensor(float("nan")), r"bias \(nan\) must be finite"),
        (torch.ones(2), 0.0, r"scale must be a single number, not a tensor of shape \[2\]"),
        ("10", 0.0, r"scale \('10'\) must be a number"),
        (None, 0.0, r"scale \(None\) must be a number"),
        (np.ones(2), 0.0, r"scale must be a single number, not a tensor of shape \[2\]"),
        (torch.tensor(True), 0.0, r"scale \(True\) must be a number"),
        (np.bool_(True), 0.0, r"scale \(True\) must be a number"),
        (torch.tensor(1j), 0.0, r"scale \(1j\) must be a number"),
        (10**400, 0.0, "must be finite"),
        (True, 0.0, r"scale \(True\) must be a number"),
    ],
)
def test_a_scale_or_bias_out_of_range_is_an_error(scale, bias, message):
    with pytest.raises(ValueError, match=message):
        Embeddings(ROWS, ROWS, scale, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "shape"), [(PairLosses, (4, 4)), (ExampleLosses, (4,))])
def test_losses_are_kept_as_they_are(kind, shape, dtype):
    values = torch.ones(shape, dtype=dtype)
    losses = kind(values)
    assert losses.values is values
    assert (len(losses), losses.device.type) == (4, "cpu")
    assert torch.equal(losses.to("cpu").values, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(4), r"values must be a non-empty matrix \[B, B\], not of shape \[4\]"),
        (torch.ones(0, 0), r"values must be a non-empty matrix \[B, B\], not of shape \[0, 0\]"),
        (torch.ones(4, 3), r"values must be a square matrix \[B, B\], not of shape \[4, 3\]"),
        (torch.ones(4, 4).double(), "values must have one of the dtypes float32, float16, bfloat16, not float64"),
        (torch.ones(4, 4).long(), "values must have one of the dtypes .* not int64"),
        ([[1.0]], "values must be a tensor, not list"),
    ],
)
def test_pair_losses_that_are_no_square_matrix_are_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        PairLosses(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(4, 1), r"values must be a non-empty vector \[B\], not of shape \[4, 1\]"),
        (torch.ones(0), r"values must be a non-empty vector \[B\], not of shape \[0\]"),
        (torch.ones(4).double(), "values must have one of the dtypes float32, float16, bfloat16, not float64"),
        ([1.0], "values must be a tensor, not list"),
        (torch.tensor([1.0, torch.nan]), "values must be finite: row 1 holds NaN or Inf"),
        (torch.tensor([-torch.inf, 1.0], dtype=torch.bfloat16), "values must be finite: row 0 holds NaN or Inf"),
    ],
)
def test_example_losses_that_are_no_finite_vector_are_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        ExampleLosses(values)
