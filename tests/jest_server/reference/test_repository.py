from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from jest_server.domain.errors import ReferenceModelError
from jest_server.reference.repository import LoadedReference, read_config, version_folder
from support import tiny_towers
from support.references import tiny_examples, tiny_export


@pytest.fixture
def own_copy(reference_repository, tmp_path):
    return shutil.copytree(reference_repository, tmp_path / "repository")


def test_the_towers_embed_as_the_modules_that_were_exported_do(reference_repository):
    export = tiny_export()
    image, text = tiny_towers.ImageTower(), tiny_towers.TextTower()
    image.load_state_dict(export.image.weights)
    text.load_state_dict(export.text.weights)
    examples = tiny_examples(5)
    with torch.inference_mode():
        expected = torch.stack([image(torch.tensor(examples["image"])), text(torch.tensor(examples["tokens"]))], dim=1)
    embedded = LoadedReference(reference_repository, "jest_reference").embed(examples)
    np.testing.assert_allclose(embedded, expected.numpy(), atol=1e-6)


def test_inputs_that_cannot_be_written_to_are_embedded_too(reference_repository):
    examples = tiny_examples(2)
    for array in examples.values():
        array.flags.writeable = False
    assert LoadedReference(reference_repository, "jest_reference").embed(examples).shape == (2, 2, tiny_towers.WIDTH)


def test_the_callers_own_module_of_the_architectures_name_is_left_alone(reference_repository, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiny_towers", None)  # importing that name would fail
    LoadedReference(reference_repository, "jest_reference")
    assert sys.modules["tiny_towers"] is None


def test_the_highest_version_is_taken_as_triton_does(own_copy):
    encoder = own_copy / "jest_image_encoder"
    for name in ("2", "10", "notes"):
        shutil.copytree(encoder / "1", encoder / name)
    assert version_folder(own_copy, "jest_image_encoder").name == "10"


def test_a_model_without_a_version_is_told(own_copy):
    shutil.rmtree(own_copy / "jest_image_encoder" / "1")
    with pytest.raises(ReferenceModelError, match="jest_image_encoder: has no numbered version folder"):
        LoadedReference(own_copy, "jest_reference")


def test_a_missing_model_is_told_with_its_file(reference_repository):
    with pytest.raises(ReferenceModelError, match=r"no_such_model/config\.pbtxt: FileNotFoundError"):
        read_config(reference_repository, "no_such_model")


def test_a_configuration_that_cannot_be_parsed_is_told_with_its_file(own_copy):
    (own_copy / "jest_reference" / "config.pbtxt").write_text("name: 7")
    with pytest.raises(ReferenceModelError, match=r"jest_reference/config\.pbtxt: ParseError"):
        read_config(own_copy, "jest_reference")


def test_weights_of_another_tower_are_refused(own_copy):
    shutil.copy(
        own_copy / "jest_text_encoder" / "1" / "weights.safetensors",
        own_copy / "jest_image_encoder" / "1" / "weights.safetensors",
    )
    with pytest.raises(ReferenceModelError, match=r"jest_image_encoder/1: RuntimeError: (?s:.*)Missing key"):
        LoadedReference(own_copy, "jest_reference")


def test_an_ensemble_that_does_not_make_both_embeddings_is_told(own_copy):
    config = own_copy / "jest_reference" / "config.pbtxt"
    config.write_text(config.read_text().replace('value: "text_embedding"', 'value: "other"'))
    with pytest.raises(ReferenceModelError, match=r"its encoders make \['image_embedding', 'other'\], expected"):
        LoadedReference(own_copy, "jest_reference")


def test_a_scorer_needs_no_torch_to_import_what_it_uses():
    modules = "jest_server.reference.triton, jest_server.reference.in_process, jest_server.reference.export"
    check = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
