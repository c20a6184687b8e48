"""What a reference model's Triton configuration has to say, read and checked in one place for every adapter.

The model is one with two outputs, ``image_embedding`` and ``text_embedding``, FP32 ``[D]`` each, usually an ensemble of
two encoders. Its ``parameters`` carry what selection needs beside the embeddings: see ``Parameter``.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING

from tritonclient.grpc import model_config_pb2 as pb

from jest_server.domain.errors import ReferenceModelError
from jest_server.domain.references import ReferenceInfo, ReferenceInput
from jest_wire.tensors import DATATYPES

if TYPE_CHECKING:
    from collections.abc import Iterable

OUTPUTS = ("image_embedding", "text_embedding")
_TYPE_PREFIX = "TYPE_"


class Parameter(StrEnum):
    """Entries of the configuration's ``parameters``, all strings."""

    SCALE = "jest_scale"
    """Logits are scale * <image, text> + bias."""
    BIAS = "jest_bias"
    VERSION = "jest_version"
    """Names the weights; embeddings of different versions are never mixed."""
    PREPROCESSING_ID = "jest_preprocessing_id"
    """Names how pictures and captions became the model's inputs."""


def reference_info(config: pb.ModelConfig) -> ReferenceInfo:
    """Reads a model's configuration.

    Raises:
        ReferenceModelError: For a configuration that cannot be that of a reference model, naming model and entry. It
            is retryable: whoever serves the model can put it right.
    """
    if config.max_batch_size < 1:
        raise _wrong(config, "max_batch_size", config.max_batch_size, "at least 1")
    return ReferenceInfo(
        name=config.name,
        version=_text(config, Parameter.VERSION),
        preprocessing_id=_text(config, Parameter.PREPROCESSING_ID),
        scale=_number(config, Parameter.SCALE),
        bias=_number(config, Parameter.BIAS),
        embedding_width=_embedding_width(config),
        inputs=_inputs(config),
    )


def datatype_of(name: str) -> pb.DataType:
    """Returns Triton's number for a datatype's name on the wire, such as "FP32"."""
    return pb.DataType.Value(_TYPE_PREFIX + name)


def _inputs(config: pb.ModelConfig) -> tuple[ReferenceInput, ...]:
    inputs = []
    for entry in config.input:
        datatype = pb.DataType.Name(entry.data_type).removeprefix(_TYPE_PREFIX)
        if datatype not in DATATYPES:
            raise _wrong(config, f"input {entry.name} data_type", datatype, f"one of {', '.join(DATATYPES)}")
        inputs.append(ReferenceInput(name=entry.name, datatype=datatype, shape=tuple(entry.dims)))
    if not inputs:
        raise _wrong(config, "input", "empty", "at least one")
    return tuple(inputs)


def _embedding_width(config: pb.ModelConfig) -> int:
    outputs = {entry.name: entry for entry in config.output}
    widths = []
    for name in OUTPUTS:
        if name not in outputs:
            raise _wrong(config, "output", _listed(outputs), _listed(OUTPUTS))
        output = outputs[name]
        if output.data_type != pb.TYPE_FP32 or len(output.dims) != 1 or output.dims[0] < 1:
            found = f"{pb.DataType.Name(output.data_type)} {list(output.dims)}"
            raise _wrong(config, f"output {name}", found, "TYPE_FP32 [D]")
        widths.append(int(output.dims[0]))
    if len(set(widths)) > 1:
        raise _wrong(config, "embedding widths", widths, "two equal ones")
    return widths[0]


def _text(config: pb.ModelConfig, parameter: Parameter) -> str:
    value = config.parameters[parameter].string_value if parameter in config.parameters else ""
    if not value:
        raise _wrong(config, f"parameter {parameter}", "missing or empty", "a string_value")
    return str(value)


def _number(config: pb.ModelConfig, parameter: Parameter) -> float:
    text = _text(config, parameter)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _wrong(config, f"parameter {parameter}", repr(text), "a finite number")
    return value


def _wrong(config: pb.ModelConfig, entry: str, found: object, expected: str) -> ReferenceModelError:
    return ReferenceModelError(f"model {config.name}: {entry} is {found}, expected {expected}", retryable=True)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "empty"
