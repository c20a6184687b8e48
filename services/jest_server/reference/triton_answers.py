"""Decode what Triton answers, which may be anything: each field is compared with its expectation before it is used.

`tritonclient` decodes on trust and raises whatever NumPy raises, so its own decoder is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jest_server.reference.arrays import broken_output
from jest_wire.tensors import DATATYPES

if TYPE_CHECKING:
    from tritonclient.grpc import service_pb2 as pb

    from jest_server.domain.references import ReferenceInfo

_F32 = np.dtype("<f4")


def decode_output(
    info: ReferenceInfo, output: str, response: pb.ModelInferResponse, *, examples: int
) -> npt.NDArray[np.float32]:
    """Return the output of this name, `[examples, D]`, its values unchecked.

    Raises:
        ReferenceModelError: If the response has not exactly one such output in its declared type, shape and size.
    """
    positions = [at for at, tensor in enumerate(response.outputs) if tensor.name == output]
    if len(positions) != 1:
        raise broken_output(info, output, f"comes {len(positions)} times, expected once")
    (at,) = positions
    tensor, contents = response.outputs[at], response.raw_output_contents
    expected = [examples, info.embedding_width]
    if tensor.datatype != "FP32" or list(tensor.shape) != expected:
        found = DATATYPES[tensor.datatype].numpy if tensor.datatype in DATATYPES else _short(tensor.datatype)
        raise broken_output(info, output, f"is {found} {_short(list(tensor.shape))}, expected {_F32} {expected}")
    if len(contents) != len(response.outputs):
        raise broken_output(info, output, f"is one of {len(response.outputs)}, but {len(contents)} came with bytes")
    size = examples * info.embedding_width * _F32.itemsize
    if len(contents[at]) != size:
        raise broken_output(info, output, f"has {len(contents[at])} bytes, expected {size} for {_F32} {expected}")
    return np.frombuffer(contents[at], _F32).reshape(expected)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
