"""Arrays to bytes and back: the only place that knows how a tensor is sent.

Bytes are raw, little-endian, row-major, announced by a `TensorSpec`, sent in `TensorChunk` messages of 1 MiB.
Only NumPy is needed; torch tensors are accepted, and made on request, without importing torch beforehand.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import xxhash

from jest_proto.v1 import tensors_pb2 as pb
from jest_wire.values import FieldError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import torch

assert sys.byteorder == "little", "tensor bytes are taken from memory as they are"

CHUNK_BYTES = 1 << 20

Bytes = npt.NDArray[np.uint8]
Array = Any
"""A NumPy array or a torch tensor."""


class Datatype(NamedTuple):
    """One row of the table of element types: its name on the wire, in NumPy and in torch."""

    name: str
    numpy: np.dtype[Any]
    torch: str


_TABLE = (
    Datatype("FP32", np.dtype(np.float32), "float32"),
    Datatype("FP16", np.dtype(np.float16), "float16"),
    Datatype("BF16", np.dtype(ml_dtypes.bfloat16), "bfloat16"),
    Datatype("UINT8", np.dtype(np.uint8), "uint8"),
    Datatype("INT32", np.dtype(np.int32), "int32"),
    Datatype("INT64", np.dtype(np.int64), "int64"),
)
DATATYPES: Mapping[str, Datatype] = {row.name: row for row in _TABLE}
_BY_NUMPY = {row.numpy: row for row in _TABLE}
_BY_TORCH = {f"torch.{row.torch}": row for row in _TABLE}


class TensorError(FieldError):
    """A tensor on the wire is invalid; the message names field, value and expectation."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, f": {problem}")


class TensorTooLargeError(TensorError):
    """The announced sizes exceed the receiver's limit."""


class TensorChecksumError(TensorError):
    """All bytes arrived, but their checksum is not the announced one."""


# Sending


def encode(tensors: Mapping[str, Array]) -> tuple[list[pb.TensorSpec], list[Bytes]]:
    """Describe named arrays and expose their bytes, copying only what is not contiguous or not in main memory.

    Args:
        tensors: NumPy arrays or torch tensors with at least one dimension.

    Raises:
        TensorError: An element type has no name on the wire, or an array has no dimensions.
    """
    flat = {name: _raw_bytes(name, array) for name, array in tensors.items()}
    specs = [
        pb.TensorSpec(
            name=name,
            datatype=datatype.name,
            shape=shape,
            byte_length=data.nbytes,
            xxh3_64=xxhash.xxh3_64_intdigest(data.data),
        )
        for name, (datatype, shape, data) in flat.items()
    ]
    return specs, [data for _, _, data in flat.values()]


def chunks(buffers: Sequence[Bytes]) -> Iterator[pb.TensorChunk]:
    """Cut buffers into messages, in the order in which they were announced."""
    for index, buffer in enumerate(buffers):
        for offset in range(0, buffer.nbytes, CHUNK_BYTES):
            yield pb.TensorChunk(
                tensor_index=index, offset=offset, data=buffer[offset : offset + CHUNK_BYTES].tobytes()
            )


def _raw_bytes(name: str, array: Array) -> tuple[Datatype, tuple[int, ...], Bytes]:
    shape = tuple(array.shape)
    if not shape:
        raise TensorError(f"tensors[{name}]", "has no dimensions, expected the first to count examples")
    numpy_array = isinstance(array, np.ndarray)
    datatype = _BY_NUMPY.get(array.dtype) if numpy_array else _BY_TORCH.get(str(array.dtype))
    if datatype is None:
        raise TensorError(f"tensors[{name}]", f"element type {array.dtype} cannot be sent, expected one of {_names()}")
    if numpy_array:
        return datatype, shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    import torch  # noqa: PLC0415 - only callers with torch tensors need it

    return datatype, shape, array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


# Receiving


def check_specs(specs: Sequence[pb.TensorSpec], *, max_bytes: int) -> None:
    """Refuse invalid announcements before a byte is allocated for them.

    Raises:
        TensorError: A datatype is unknown, a dimension negative, a byte_length does not match its shape, or two
            tensors have one name.
        TensorTooLargeError: All tensors together exceed `max_bytes`.
    """
    seen: set[str] = set()
    for spec in specs:
        field = f"tensors[{spec.name}]"
        if spec.name in seen:
            raise TensorError(field, "is announced twice")
        seen.add(spec.name)
        if spec.datatype not in DATATYPES:
            raise TensorError(f"{field}.datatype", f"is {spec.datatype!r}, expected one of {_names()}")
        if not spec.shape or any(size < 0 for size in spec.shape):
            raise TensorError(f"{field}.shape", f"is {list(spec.shape)}, expected one or more sizes of at least 0")
        expected = math.prod(spec.shape) * DATATYPES[spec.datatype].numpy.itemsize
        if spec.byte_length != expected:
            raise TensorError(
                f"{field}.byte_length",
                f"is {spec.byte_length}, expected {expected} for shape {list(spec.shape)} of {spec.datatype}",
            )
    total = sum(spec.byte_length for spec in specs)
    if total > max_bytes:
        raise TensorTooLargeError("tensors", f"announce {total} bytes together, the limit is {max_bytes}")


class TensorStream:
    """Assembles announced tensors from chunks and returns each as soon as it is complete.

    It holds one tensor at a time, allocated once, when its first chunk is due. Each byte is copied once; checksums are
    updated with each chunk, so that no single step takes long.
    """

    def __init__(self, specs: Sequence[pb.TensorSpec], *, max_bytes: int) -> None:
        check_specs(specs, max_bytes=max_bytes)
        self._specs = specs
        self._index = 0
        self._buffer: Bytes
        self._filled: int
        self._checksum: xxhash.xxh3_64
        self._start()

    def add(self, chunk: pb.TensorChunk) -> list[Bytes]:
        """Add the next chunk; return the bytes of the tensor that it completes, and of empty ones that follow.

        Raises:
            TensorError: It is not exactly the next chunk, or reaches beyond its tensor's end.
            TensorChecksumError: The tensor's bytes do not have the announced checksum.
        """
        data = chunk.data  # each access would copy
        complete = self._skip_empty()
        if self._index == len(self._specs):
            raise TensorError("chunk", f"of {len(data)} bytes comes after the last announced tensor was complete")
        if (chunk.tensor_index, chunk.offset) != (self._index, self._filled):
            raise TensorError(
                "chunk",
                f"is for tensor {chunk.tensor_index} at offset {chunk.offset}, "
                f"expected tensor {self._index} at offset {self._filled}",
            )
        end = self._filled + len(data)
        if end > self._buffer.nbytes or not data:
            raise TensorError("chunk.data", f"is {len(data)} bytes, expected 1 to {self._buffer.nbytes - self._filled}")
        self._buffer[self._filled : end] = np.frombuffer(data, np.uint8)
        self._checksum.update(data)
        self._filled = end
        if end == self._buffer.nbytes:
            complete.append(self._take())
        return complete + self._skip_empty()

    def finish(self) -> list[Bytes]:
        """Return what is left: the empty tensors of a stream without chunks.

        Raises:
            TensorError: Bytes are missing.
        """
        rest = self._skip_empty()
        if self._index < len(self._specs):
            spec = self._specs[self._index]
            raise TensorError(f"tensors[{spec.name}]", f"ended after {self._filled} bytes, expected {spec.byte_length}")
        return rest

    def _start(self) -> None:
        """Prepare for the next tensor."""
        size = self._specs[self._index].byte_length if self._index < len(self._specs) else 0
        self._buffer = np.empty(size, np.uint8)
        self._filled = 0
        self._checksum = xxhash.xxh3_64()

    def _take(self) -> Bytes:
        spec, data = self._specs[self._index], self._buffer
        if self._checksum.intdigest() != spec.xxh3_64:
            raise TensorChecksumError(f"tensors[{spec.name}]", "arrived with another checksum than announced")
        self._index += 1
        self._start()
        return data

    def _skip_empty(self) -> list[Bytes]:
        empty = []
        while self._index < len(self._specs) and not self._buffer.nbytes:
            empty.append(self._take())
        return empty


class Assembler:
    """Assembles announced tensors from chunks, and keeps them all."""

    def __init__(self, specs: Sequence[pb.TensorSpec], *, max_bytes: int) -> None:
        self._stream = TensorStream(specs, max_bytes=max_bytes)
        self._buffers: list[Bytes] = []

    def add(self, chunk: pb.TensorChunk) -> None:
        """Add the next chunk.

        Raises:
            TensorError: It is not exactly the next chunk, or reaches beyond its tensor's end.
            TensorChecksumError: It completes a tensor whose bytes do not have the announced checksum.
        """
        self._buffers += self._stream.add(chunk)

    def finish(self) -> list[Bytes]:
        """Return the bytes of all tensors.

        Raises:
            TensorError: Bytes are missing.
        """
        return self._buffers + self._stream.finish()


def as_numpy(spec: pb.TensorSpec, data: Bytes | bytes | memoryview) -> npt.NDArray[Any]:
    """View raw bytes as the array that `spec` describes, without copying."""
    return np.frombuffer(data, DATATYPES[spec.datatype].numpy).reshape(tuple(spec.shape))


def as_torch(spec: pb.TensorSpec, data: Bytes) -> torch.Tensor:
    """View raw bytes as the tensor that `spec` describes, in main memory, without copying."""
    import torch  # noqa: PLC0415 - only callers with torch tensors need it

    dtype = getattr(torch, DATATYPES[spec.datatype].torch)
    if not data.nbytes:  # torch refuses to view nothing as another type
        return torch.empty(tuple(spec.shape), dtype=dtype)
    return torch.from_numpy(data).view(dtype).reshape(tuple(spec.shape))


def content_digest(specs: Iterable[pb.TensorSpec], *context: object) -> str:
    """Return a digest of a call's content: equal for equal tensors and context, however the bytes were cut."""
    digest = xxhash.xxh3_128()
    for part in (*context, *((s.name, s.datatype, tuple(s.shape), s.xxh3_64) for s in specs)):
        digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _names() -> str:
    return ", ".join(DATATYPES)
