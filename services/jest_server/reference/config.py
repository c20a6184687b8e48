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
    from collections.abc import Iterable, Sequence

OUTPUTS = ("image_embedding", "text_embedding")
MAX_EMBEDDING_WIDTH = 65_536
MAX_INPUTS = 16
MAX_DIMS = 8
MAX_INPUT_ELEMENTS = 1 << 24
"""Of one input of one example: a picture of 2,300 by 2,300 fits."""
MAX_TEXT = 256
"""Characters of names and parameters: they become parts of keys, labels and messages."""
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
    if len(config.input) > MAX_INPUTS:
        raise _wrong(config, "number of inputs", len(config.input), f"up to {MAX_INPUTS}")
    inputs = []
    for entry in config.input:
        if len(entry.name) > MAX_TEXT:
            raise _wrong(config, "length of an input's name", len(entry.name), f"up to {MAX_TEXT}")
        datatype = _datatype(entry).removeprefix(_TYPE_PREFIX)
        if datatype not in DATATYPES:
            raise _wrong(config, f"input {entry.name} data_type", datatype, f"one of {', '.join(DATATYPES)}")
        if not _dims_fit(entry.dims):
            expected = f"up to {MAX_DIMS} of -1 or more than 0, {MAX_INPUT_ELEMENTS} elements in all"
            raise _wrong(config, f"input {entry.name} dims", list(entry.dims[: MAX_DIMS + 1]), expected)
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
        dims = list(output.dims)
        if output.data_type != pb.TYPE_FP32 or len(dims) != 1 or not 1 <= dims[0] <= MAX_EMBEDDING_WIDTH:
            found = f"{_datatype(output)} {dims[: MAX_DIMS + 1]}"
            raise _wrong(config, f"output {name}", found, f"TYPE_FP32 [D], D from 1 to {MAX_EMBEDDING_WIDTH}")
        widths.append(int(output.dims[0]))
    if len(set(widths)) > 1:
        raise _wrong(config, "embedding widths", widths, "two equal ones")
    return widths[0]


def _text(config: pb.ModelConfig, parameter: Parameter) -> str:
    value = config.parameters[parameter].string_value if parameter in config.parameters else ""
    if not value:
        raise _wrong(config, f"parameter {parameter}", "missing or empty", "a string_value")
    if len(value) > MAX_TEXT:
        raise _wrong(config, f"parameter {parameter}", f"{len(value)} characters long", f"up to {MAX_TEXT}")
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


def _datatype(entry: pb.ModelInput | pb.ModelOutput) -> str:
    """Return the name of a tensor's datatype, or its number if a newer Triton's has no name here."""
    number = entry.data_type
    return pb.DataType.Name(number) if number in pb.DataType.values() else str(number)


def _dims_fit(dims: Sequence[int]) -> bool:
    return (
        len(dims) <= MAX_DIMS
        and all(size == -1 or size > 0 for size in dims)
        and math.prod(abs(size) for size in dims) <= MAX_INPUT_ELEMENTS
    )


def _wrong(config: pb.ModelConfig, entry: str, found: object, expected: str) -> ReferenceModelError:
    return ReferenceModelError(
        f"model {config.name[:MAX_TEXT]}: {entry} is {found}, expected {expected}", retryable=True
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)[:MAX_TEXT] or "empty"
