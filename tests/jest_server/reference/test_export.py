from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from jest_server.domain.references import ReferenceInput
from jest_server.reference.export import ENCODER, TEMPLATE, export_reference
from jest_server.reference.repository import LoadedReference, read_config
from support import tiny_towers
from support.references import TOKENS, export_tiny_reference, tiny_examples, tiny_export


def tokens(**changes):
    return TOKENS.model_copy(update=changes)


@pytest.fixture
def export(tmp_path):
    """Exports with changes to the tiny model; the destination is always the same."""

    def run(**changes):
        return export_reference(replace(tiny_export(), **changes), tmp_path / "repository")

    return run


def test_what_was_exported_is_what_scorers_read(export, tmp_path):
    info = export(scale=12.5, bias=-3.0, version="mine")
    assert (info.scale, info.bias, info.version, info.preprocessing_id) == (12.5, -3.0, "mine", "tiny-v1")
    assert info.embedding_width == tiny_towers.WIDTH
    assert [declared.name for declared in info.inputs] == ["image", "tokens"]
    assert LoadedReference(tmp_path / "repository", "jest_reference").info == info


def test_scale_and_bias_keep_every_digit(export):
    info = export(scale=1 / 3, bias=-1e-17)
    assert (info.scale, info.bias) == (1 / 3, -1e-17)


def test_both_encoders_run_the_same_file(export, tmp_path):
    export()
    written = [(tmp_path / f"repository/jest_{part}_encoder/1/model.py").read_text() for part in ("image", "text")]
    assert written == [ENCODER.read_text()] * 2


def test_the_template_holds_no_weights_and_no_answers():
    assert {file.name for file in TEMPLATE.rglob("*") if file.is_file()} == {"config.pbtxt"}
    parameters = read_config(TEMPLATE, "jest_reference").parameters
    assert {entry.string_value for entry in parameters.values()} == {""}


def test_serving_choices_of_the_template_are_kept(export, tmp_path):
    export()
    for part in ("image", "text"):
        template, exported = (read_config(root, f"jest_{part}_encoder") for root in (TEMPLATE, tmp_path / "repository"))
        assert exported.max_batch_size == template.max_batch_size
        assert exported.instance_group == template.instance_group
        assert exported.dynamic_batching == template.dynamic_batching
        assert exported.parameters["cpu_threads"] == template.parameters["cpu_threads"]


def test_inputs_may_have_other_names_than_the_templates(export, tmp_path):
    tower = replace(tiny_export().text, inputs=(ReferenceInput(name="caption", datatype="INT32", shape=(6,)),))
    assert [declared.name for declared in export(text=tower).inputs] == ["image", "caption"]
    examples = tiny_examples(2)
    examples["caption"] = examples.pop("tokens")
    assert LoadedReference(tmp_path / "repository", "jest_reference").embed(examples).shape[0] == 2


def test_the_default_version_names_the_weights(tmp_path):
    first, again, other = (
        export_tiny_reference(tmp_path / name, seed=seed).version for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first != other


def test_the_default_version_changes_with_the_architecture(tmp_path, export):
    changed = tmp_path / "tiny_towers.py"
    changed.write_text(Path(tiny_towers.__file__).read_text() + "\n# changed\n")
    other = export_reference(replace(tiny_export(), architecture=changed), tmp_path / "other")
    assert other.version != export().version


def test_weights_that_share_memory_can_be_exported(export):
    weights = dict(tiny_export().image.weights)
    weights["project.bias"] = weights["project.weight"][0, : tiny_towers.WIDTH]
    export(image=replace(tiny_export().image, weights=weights))


def test_another_user_can_read_all_of_it(export, tmp_path):
    export()
    for path in (tmp_path / "repository").rglob("*"):
        wanted = stat.S_IROTH | stat.S_IXOTH if path.is_dir() else stat.S_IROTH
        assert path.stat().st_mode & wanted == wanted, path


def test_a_served_repository_is_never_overwritten(export):
    export()
    with pytest.raises(ValueError, match=r"destination .*repository exists already, expected a new folder"):
        export()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scale": 0.0}, "scale is 0.0, expected a finite number above 0"),
        ({"bias": float("nan")}, "bias is nan, expected a finite number"),
        ({"embedding_width": 0}, "embedding_width is 0, expected at least 1"),
        ({"preprocessing_id": ""}, "preprocessing_id is empty, expected a name"),
        ({"version": ""}, "version is empty, expected a name"),
        ({"architecture": Path("nowhere.py")}, r"architecture is nowhere.py, expected a Python file"),
        ({"text": replace(tiny_export().text, factory="TextTower")}, "text.factory is 'TextTower', expected 'module:"),
        ({"text": replace(tiny_export().text, inputs=())}, "text.inputs is empty, expected at least one"),
        ({"text": replace(tiny_export().text, weights={})}, "text.weights is empty, expected a state dict"),
        (
            {"text": replace(tiny_export().text, factory_args={"x": {1}})},
            "text.factory_args is .*, expected JSON types",
        ),
        (
            {"text": replace(tiny_export().text, inputs=(tokens(datatype="STRING"),))},
            r"text.inputs\[tokens\].datatype is STRING, expected one of FP32",
        ),
        (
            {"text": replace(tiny_export().text, inputs=(tokens(shape=(0,)),))},
            r"text.inputs\[tokens\].shape is \(0,\), expected sizes, or -1",
        ),
        (
            {"text": replace(tiny_export().text, inputs=(tokens(name="image"),))},
            r"inputs of both towers is \['image'\], expected names that belong to one of them",
        ),
    ],
)
def test_what_cannot_be_right_is_told_before_anything_is_written(export, tmp_path, changes, problem):
    with pytest.raises(ValueError, match=problem):
        export(**changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"embedding_width": 7}, r"image_embedding is float32 \[1, 12\], expected float32 \[1, 7\]"),
        ({"architecture": None}, "No module named 'tiny_towers'"),
        ({"image": replace(tiny_export().image, factory="tiny_towers:NoTower")}, "no attribute 'NoTower'"),
        ({"image": replace(tiny_export().image, factory_args={"width": 3})}, "size mismatch for project.weight"),
        ({"image": replace(tiny_export().image, factory_args={"depth": 3})}, "unexpected keyword argument 'depth'"),
    ],
)
def test_a_model_that_does_not_work_is_found_out_and_leaves_nothing(export, tmp_path, changes, problem):
    with pytest.raises(ValueError, match=f"the exported model does not work: .*(?s:.*){problem}"):
        export(**changes)
    assert not list(tmp_path.iterdir())
