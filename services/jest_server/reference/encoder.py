"""One encoder of the reference model for Triton's Python backend: exported as the `model.py` of every tower.

The architecture is a factory named in config.pbtxt, the weights are weights.safetensors beside this file. Tensors pass
as DLPack only: the NumPy bridge of Triton before 24.11 corrupts data silently under NumPy 2. Runs on Python 3.10 and
later, with torch and safetensors installed.
"""

from __future__ import annotations

import importlib
import json
import pathlib
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.dlpack
import triton_python_backend_utils as pb
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    Feed = Sequence[torch.Tensor]  # one request's inputs, in the order of config.pbtxt, each [rows, ...]

_BAD_VALUES = (IndexError, ValueError)


class TritonPythonModel:
    """One instance of the encoder, on the device that Triton gave it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Builds the tower and loads its weights, all of them and nothing else."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._inputs = [declared["name"] for declared in config["input"]]
        self._alike = _inputs_declared_alike(config["input"])
        self._output = config["output"][0]["name"]
        if args["model_instance_kind"] == "GPU":
            self._device = torch.device("cuda", int(args["model_instance_device_id"]))
        else:
            self._device = torch.device("cpu")
            torch.set_num_threads(int(parameters.get("cpu_threads", "1")))
        module, _, factory = parameters["factory"].partition(":")
        tower = getattr(importlib.import_module(module), factory)(**json.loads(parameters.get("factory_args", "{}")))
        folder = pathlib.Path(args["model_repository"]) / args["model_version"]
        tower.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
        self._tower = tower.eval().to(self._device)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers each request with its embeddings or with its own error: none fails for a batch-mate's fault."""
        answers: dict[int, Any] = {}
        batches: defaultdict[tuple[torch.Size, ...], dict[int, Feed]] = defaultdict(dict)
        for index, request in enumerate(requests):
            feed = [
                torch.utils.dlpack.from_dlpack(pb.get_input_tensor_by_name(request, name).to_dlpack())
                for name in self._inputs
            ]
            problem = self._problem(feed)
            if problem:
                answers[index] = pb.TritonError(problem, pb.TritonError.INVALID_ARG)
            else:
                batches[tuple(tensor.shape[1:] for tensor in feed)][index] = feed
        for batch in batches.values():  # rows of different lengths are never padded: 0 may be a token
            answers |= zip(batch, self._embed(list(batch.values())), strict=True)
        return [self._response(answers[index]) for index in range(len(requests))]

    def _problem(self, feed: Feed) -> str | None:
        """Triton lets inputs of one open shape, such as tokens and their mask, come in different lengths."""
        for names in self._alike:
            shapes = {name: list(feed[self._inputs.index(name)].shape[1:]) for name in names}
            if len({tuple(shape) for shape in shapes.values()}) > 1:
                return f"inputs declared alike have different shapes: {shapes}"
        return None

    def _embed(self, feeds: list[Feed]) -> list[Any]:
        """Returns a tensor or a TritonError for each feed, running all at once if that works, else each alone."""
        try:
            columns = [torch.cat(column).to(self._device) for column in zip(*feeds, strict=True)]
            with torch.inference_mode():
                rows = self._tower(*columns).float().cpu()
            return list(rows.split([len(feed[0]) for feed in feeds]))
        except Exception as error:  # noqa: BLE001 - any error of an architecture becomes an answer
            if len(feeds) > 1:
                return [answer for feed in feeds for answer in self._embed([feed])]
            pb.Logger.log_error(f"tower failed: {error!r}")
            return [_refusal(error)]

    def _response(self, answer: Any) -> Any:
        if isinstance(answer, pb.TritonError):
            return pb.InferenceResponse(error=answer)
        return pb.InferenceResponse(output_tensors=[pb.Tensor.from_dlpack(self._output, answer)])


def _inputs_declared_alike(declared: list[dict[str, Any]]) -> list[list[str]]:
    groups = defaultdict(list)
    for entry in declared:
        groups[tuple(int(size) for size in entry["dims"])].append(entry["name"])
    return [names for dims, names in groups.items() if -1 in dims and len(names) > 1]


def _refusal(error: Exception) -> Any:
    """Tells the kind of error; its words may hold paths of this machine and stay in Triton's log."""
    kind = type(error).__name__
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return pb.TritonError(f"{kind}: send fewer examples at once", pb.TritonError.UNAVAILABLE)
    if isinstance(error, _BAD_VALUES):
        return pb.TritonError(f"{kind}: the tower refuses these values", pb.TritonError.INVALID_ARG)
    return pb.TritonError(f"{kind} in the tower; Triton's log tells more", pb.TritonError.INTERNAL)
