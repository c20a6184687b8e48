"""What a preprocessing function may return, and how wrong ones are told."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from jest_server.domain.references import ReferenceInput
from jest_server.examples.decoding import Example
from jest_server.examples.preprocessing import ExamplesRefused, Preprocessing, PreprocessingError, load_function
from support.embedding_shards import reference_info

INPUTS = (
    ReferenceInput(name="image", datatype="UINT8", shape=(3, 2, 2)),
    ReferenceInput(name="tokens", datatype="INT32", shape=(-1,)),
)
EXAMPLES = [Example(f"k{i}", Image.new("RGB", (2, 2)), "c") for i in range(2)]
RIGHT = {"image": np.zeros((2, 3, 2, 2), np.uint8), "tokens": np.zeros((2, 5), np.int32)}


def made_by(function):
    return Preprocessing("m:f", function, reference_info(inputs=INPUTS))(EXAMPLES)


def test_what_the_model_takes_is_passed_on():
    assert made_by(lambda _: RIGHT) is RIGHT


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "m:f returned NoneType, expected a dict of numpy arrays"),
        ({}, "m:f returned dict, expected a dict of numpy arrays"),
        (RIGHT | {"tokens": [[1], [2]]}, "tokens is a list, expected a numpy array with a row per example"),
        ({"image": RIGHT["image"]}, r"inputs: \['image'\], expected \['image', 'tokens'\]"),
        (RIGHT | {"tokens": np.zeros((2, 5))}, "datatype of input tokens: float64, expected int32"),
        (RIGHT | {"image": np.zeros((2, 2, 2, 3), np.uint8)}, r"shape of input image: \[2, 2, 2, 3\], expected \[n, 3"),
        ({name: array[:1] for name, array in RIGHT.items()}, "m:f returned 1 rows, expected 2, one per example"),
    ],
)
def test_what_the_model_does_not_take_is_told_by_name_value_and_expectation(made, message):
    with pytest.raises(PreprocessingError, match=message):
        made_by(lambda _: made)


def test_a_function_that_raises_refuses_its_examples():
    def fails(examples):
        raise KeyError(examples[0].key)

    with pytest.raises(ExamplesRefused, match=r"m:f: KeyError\('k0'\)"):
        made_by(fails)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "which cannot be imported: ModuleNotFoundError"),
        ("json:no_such_function", "which cannot be imported: AttributeError"),
        ("json:decoder", "expected a function, not a module"),
    ],
)
def test_a_function_that_is_not_there_is_told(name, message):
    with pytest.raises(ValueError, match=f"--preprocess is '{name}', {message}"):
        load_function(name)


def test_functions_are_found_in_the_folder_where_the_command_was_started(tmp_path, monkeypatch):
    (tmp_path / "only_here_xyz.py").write_text("def f(examples): return {}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert load_function("only_here_xyz:f")([]) == {}
