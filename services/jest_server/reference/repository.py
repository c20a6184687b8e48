"""A reference model's Triton model repository on disk, and running its towers without Triton.

Layout: ``<ensemble>/config.pbtxt`` names the encoders and carries the parameters; ``<encoder>/config.pbtxt`` names a
factory, which makes the tower for ``<encoder>/<version>/weights.safetensors`` and lies in a module beside them or is
importable. Importing this module imports no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from jest_server.domain.errors import ReferenceModelError
from jest_server.reference.arrays import checked_embedding
from jest_server.reference.config import OUTPUTS, reference_info

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from jest_server.domain.references import ReferenceInfo

CONFIG = "config.pbtxt"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class _Encoder:
    """One step of the ensemble: a tower, the ensemble's inputs in its order, and the ensemble's output it makes."""

    tower: torch.nn.Module
    inputs: tuple[str, ...]
    output: str


class LoadedReference:
    """A reference model's towers in this process, on the CPU or ``device``."""

    def __init__(self, repository: Path, model: str, *, device: str = "cpu") -> None:
        """Reads the configuration and loads the towers.

        Raises:
            ReferenceModelError: Naming the file, if the repository does not hold a servable reference model.
        """
        config = read_config(repository, model)
        self.info: ReferenceInfo = reference_info(config)
        self.max_batch_size = int(config.max_batch_size)
        self._device = device
        self._encoders = {
            encoder.output: encoder
            for encoder in (_load_encoder(repository, step, device) for step in config.ensemble_scheduling.step)
        }
        if self._encoders.keys() != set(OUTPUTS):
            raise ReferenceModelError(
                f"model {model}: its encoders make {sorted(self._encoders)}, expected {sorted(OUTPUTS)}", retryable=True
            )

    def embed(self, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """Embeds n examples of the right names and datatypes in one go: ``[n, 2, D]``, image before text.

        Raises:
            ReferenceModelError: If what a tower makes is not a finite ``[n, D]``.
        """
        examples = len(next(iter(inputs.values())))
        embeddings = np.empty((examples, len(OUTPUTS), self.info.embedding_width), np.float32)
        for column, output in enumerate(OUTPUTS):
            array = self._run(self._encoders[output], inputs)
            embeddings[:, column] = checked_embedding(self.info, output, array, examples=examples)
        return embeddings

    def _run(self, encoder: _Encoder, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        import torch  # noqa: PLC0415 - only who runs towers needs torch

        with torch.inference_mode():
            # Arrays that came off a wire are read-only, which torch warns about: it gets its own copies.
            columns = [torch.from_numpy(np.array(inputs[name])).to(self._device) for name in encoder.inputs]
            rows: torch.Tensor = encoder.tower(*columns)
            return np.asarray(rows.float().cpu().numpy())


def read_config(repository: Path, model: str) -> pb.ModelConfig:
    """Reads a model's config.pbtxt.

    Raises:
        ReferenceModelError: If the file is not there or cannot be parsed.
    """
    path = repository / model / CONFIG
    try:
        return text_format.Parse(path.read_text(), pb.ModelConfig())
    except (OSError, text_format.ParseError) as error:
        raise _unusable(path, error) from error


def version_folder(repository: Path, model: str) -> Path:
    """Returns the folder of the model's highest version, the one that Triton serves by default.

    Raises:
        ReferenceModelError: If the model has no version.
    """
    folder = repository / model
    versions = [path for path in folder.glob("[1-9]*") if path.name.isdecimal() and path.is_dir()]
    if not versions:
        raise ReferenceModelError(f"{folder}: has no numbered version folder", retryable=True)
    return max(versions, key=lambda path: int(path.name))


def _load_encoder(repository: Path, step: pb.ModelEnsembling.Step, device: str) -> _Encoder:
    config = read_config(repository, step.model_name)
    folder = version_folder(repository, step.model_name)
    try:
        tower = _load_tower(folder, {name: entry.string_value for name, entry in config.parameters.items()})
        return _Encoder(
            tower=tower.eval().to(device),
            inputs=tuple(step.input_map[entry.name] for entry in config.input),
            output=step.output_map[config.output[0].name],
        )
    except Exception as error:
        raise _unusable(folder, error) from error


def _load_tower(folder: Path, parameters: Mapping[str, str]) -> torch.nn.Module:
    from safetensors.torch import load_file  # noqa: PLC0415 - only who runs towers needs torch

    module, _, factory = parameters["factory"].partition(":")
    make: Callable[..., torch.nn.Module] = getattr(_import_architecture(folder, module), factory)
    tower = make(**json.loads(parameters["factory_args"]))
    tower.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    return tower


def _import_architecture(folder: Path, module: str) -> Any:
    beside = folder / f"{module}.py"
    if not beside.exists():
        return importlib.import_module(module)
    # Under a name of its own: both encoders, two models, or the caller may have different modules of one name.
    name = f"{module}_{uuid.uuid4().hex}"
    spec = importlib.util.spec_from_file_location(name, beside)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # dataclasses and typing look their module up
    spec.loader.exec_module(loaded)
    return loaded


def _unusable(path: Path, error: Exception) -> ReferenceModelError:
    return ReferenceModelError(f"{path}: {type(error).__name__}: {error}", retryable=True)
