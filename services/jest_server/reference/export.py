"""Makes a servable Triton model repository of two trained towers.

    export_reference(
        ReferenceExport(
            image=Tower("towers:ImageTower", model.image.state_dict(), (ReferenceInput(...),), {"width": 96}),
            text=Tower("towers:TextTower", model.text.state_dict(), (ReferenceInput(...),), {"vocabulary": 900}),
            architecture=Path("towers.py"),
            scale=10.0, bias=-10.0, embedding_width=96, preprocessing_id="rgb32-v1",
        ),
        Path("build/reference"),
    )

Serving choices (batch limit, queue, instances, threads) come from the template's config.pbtxt files, which lie in
`template` beside this module: pass a changed copy of that folder to choose others. `encoder.py` becomes the `model.py`
of both encoders.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import text_format

from jest_server.reference.arrays import neutral_example
from jest_server.reference.config import Parameter, datatype_of
from jest_server.reference.repository import CONFIG, WEIGHTS, LoadedReference, read_config, version_folder
from jest_wire.tensors import DATATYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from tritonclient.grpc import model_config_pb2 as pb

    from jest_server.domain.references import ReferenceInfo, ReferenceInput

ENSEMBLE = "jest_reference"
TEMPLATE = Path(__file__).with_name("template")
ENCODER = Path(__file__).with_name("encoder.py")
_VERSION = "1"
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_VERSION_DIGITS = 16


@dataclass(frozen=True)
class Tower:
    """One encoder: a factory that makes it, and its trained weights."""

    factory: str
    """"module:callable", the module being ``ReferenceExport.architecture`` or importable where Triton runs."""
    weights: Mapping[str, torch.Tensor]
    """The state dict, complete."""
    inputs: tuple[ReferenceInput, ...]
    """What the tower takes, in the order of its arguments; shapes without the batch dimension."""
    factory_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments for the factory, in JSON types."""


@dataclass(frozen=True)
class ReferenceExport:
    """A reference model, complete: logits are ``scale * <image, text> + bias``."""

    image: Tower
    text: Tower
    scale: float
    bias: float
    embedding_width: int
    preprocessing_id: str
    """Names how pictures and captions became inputs; cached embeddings are found by it."""
    architecture: Path | None = None
    """One Python file with the factories, put beside the weights."""
    version: str | None = None
    """Names the embeddings; none: a digest of weights, architecture and factories."""

    @property
    def towers(self) -> dict[str, Tower]:
        """The towers by their part of the template's names."""
        return {"image": self.image, "text": self.text}


def export_reference(export: ReferenceExport, destination: Path, *, template: Path = TEMPLATE) -> ReferenceInfo:
    """Writes the repository, complete and tried out, or nothing; returns what its scorers will read from it.

    Args:
        export: The model.
        destination: A new folder. A served repository is never changed in place: embeddings of two models would mix.
        template: Configuration files to start from, one folder per model.

    Raises:
        ValueError: If something cannot be right, naming field, value and expectation, or if a tower made of factory
            and weights does not embed a neutral example.
    """
    _check(export)
    if destination.exists():
        raise ValueError(f"destination {destination} exists already, expected a new folder")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as temporary:
        draft = Path(temporary) / "repository"
        shutil.copytree(template, draft)
        for part, tower in export.towers.items():
            _write_tower(draft, f"jest_{part}_encoder", tower, export)
        _write_ensemble(draft, export, export.version or _digest(draft, export))
        info = _tried(draft)
        draft.rename(destination)
    return info


def _check(export: ReferenceExport) -> None:
    _expect(math.isfinite(export.scale) and export.scale > 0, "scale", export.scale, "a finite number above 0")
    _expect(math.isfinite(export.bias), "bias", export.bias, "a finite number")
    _expect(export.embedding_width >= 1, "embedding_width", export.embedding_width, "at least 1")
    _expect(bool(export.preprocessing_id), "preprocessing_id", "empty", "a name")
    _expect(export.version != "", "version", "empty", "a name, or None for a digest of the weights")
    if export.architecture is not None:
        _expect(export.architecture.is_file(), "architecture", export.architecture, "a Python file")
    for part, tower in export.towers.items():
        _check_tower(part, tower)
    shared = {entry.name for entry in export.image.inputs} & {entry.name for entry in export.text.inputs}
    _expect(not shared, "inputs of both towers", sorted(shared), "names that belong to one of them")


def _check_tower(part: str, tower: Tower) -> None:
    _expect(bool(_FACTORY.fullmatch(tower.factory)), f"{part}.factory", repr(tower.factory), "'module:callable'")
    _expect(bool(tower.inputs), f"{part}.inputs", "empty", "at least one")
    for entry in tower.inputs:
        field_name = f"{part}.inputs[{entry.name}]"
        _expect(entry.datatype in DATATYPES, f"{field_name}.datatype", entry.datatype, f"one of {', '.join(DATATYPES)}")
        _expect(all(size == -1 or size > 0 for size in entry.shape), f"{field_name}.shape", entry.shape, "sizes, or -1")
    _expect(bool(tower.weights), f"{part}.weights", "empty", "a state dict")
    try:
        json.dumps(dict(tower.factory_args))
    except TypeError as error:
        raise ValueError(f"{part}.factory_args is {tower.factory_args}, expected JSON types: {error}") from error


def _expect(right: bool, name: str, value: object, expectation: str) -> None:
    if not right:
        raise ValueError(f"{name} is {value}, expected {expectation}")


def _write_tower(repository: Path, model: str, tower: Tower, export: ReferenceExport) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415 - a scorer without torch imports this package too

    folder = repository / model / _VERSION
    folder.mkdir(exist_ok=True)
    shutil.copyfile(ENCODER, folder / "model.py")
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in tower.weights.items()}
    save_file(weights, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # Triton may run as another user, and safetensors lets only the owner read
    if export.architecture is not None:
        shutil.copy(export.architecture, folder)
    config = read_config(repository, model)
    _set_inputs(config, tower.inputs)
    config.output[0].dims[:] = [export.embedding_width]
    config.parameters["factory"].string_value = tower.factory
    config.parameters["factory_args"].string_value = json.dumps(dict(tower.factory_args), sort_keys=True)
    _write_config(repository, config)


def _write_ensemble(repository: Path, export: ReferenceExport, version: str) -> None:
    (repository / ENSEMBLE / _VERSION).mkdir(exist_ok=True)  # Triton serves no ensemble without one
    config = read_config(repository, ENSEMBLE)
    _set_inputs(config, export.image.inputs + export.text.inputs)
    for output in config.output:
        output.dims[:] = [export.embedding_width]
    for step, tower in zip(config.ensemble_scheduling.step, export.towers.values(), strict=True):
        step.input_map.clear()
        step.input_map.update({entry.name: entry.name for entry in tower.inputs})
    config.parameters[Parameter.SCALE].string_value = repr(float(export.scale))
    config.parameters[Parameter.BIAS].string_value = repr(float(export.bias))
    config.parameters[Parameter.VERSION].string_value = version
    config.parameters[Parameter.PREPROCESSING_ID].string_value = export.preprocessing_id
    _write_config(repository, config)


def _set_inputs(config: pb.ModelConfig, inputs: tuple[ReferenceInput, ...]) -> None:
    del config.input[:]
    for entry in inputs:
        config.input.add(name=entry.name, data_type=datatype_of(entry.datatype), dims=entry.shape)


def _write_config(repository: Path, config: pb.ModelConfig) -> None:
    (repository / config.name / CONFIG).write_text(text_format.MessageToString(config))


def _digest(repository: Path, export: ReferenceExport) -> str:
    """Changes with anything that can change an embedding: weights, architecture, factories and their arguments."""
    digest = hashlib.sha256()
    for part, tower in export.towers.items():
        digest.update(json.dumps([tower.factory, dict(tower.factory_args)], sort_keys=True).encode())
        with (version_folder(repository, f"jest_{part}_encoder") / WEIGHTS).open("rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    if export.architecture is not None:
        digest.update(export.architecture.read_bytes())
    return digest.hexdigest()[:_VERSION_DIGITS]


def _tried(repository: Path) -> ReferenceInfo:
    try:
        loaded = LoadedReference(repository, ENSEMBLE)
        loaded.embed(neutral_example(loaded.info))
    except Exception as error:
        raise ValueError(f"the exported model does not work: {error}") from error
    return loaded.info
