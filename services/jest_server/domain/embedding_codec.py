"""How reference embeddings lie in a cache: as f16, or as int8 with a scale for each row, at half the size.

Shapes: n = examples, D = embedding width; every example has two rows, image before text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from jest_server.domain.references import ReferenceInfo

Precision = Literal["float16", "int8"]

_F16: Final = np.dtype("<f2")
_SCALE: Final = np.dtype("<f4")
_LARGEST = 127
_ROWS = 2


class EmbeddingCodec(Protocol):
    """Between embeddings as the server hands them on, ``[2, D]`` f16 bytes each, and the values of a cache."""

    precision: Precision

    def value_bytes(self, width: int) -> int:
        """Size of one example's value."""

    def encode(self, embeddings: Sequence[bytes], width: int) -> list[bytes]:
        """Returns one value for each example."""

    def decode(self, values: Sequence[bytes], width: int) -> list[bytes]:
        """Returns each example's embeddings, from values of the right size."""


class Float16Codec:
    """The values are the embeddings."""

    precision: Precision = "float16"

    def value_bytes(self, width: int) -> int:
        """2 * D numbers of two bytes."""
        return _ROWS * width * _F16.itemsize

    def encode(self, embeddings: Sequence[bytes], width: int) -> list[bytes]:
        """See the protocol."""
        del width
        return list(embeddings)

    def decode(self, values: Sequence[bytes], width: int) -> list[bytes]:
        """See the protocol."""
        del width
        return list(values)


class Int8Codec:
    """Each row as its largest magnitude / 127 (f32) and D integers from -127 to 127: off by at most half a step."""

    precision: Precision = "int8"

    def value_bytes(self, width: int) -> int:
        """Two scales of four bytes and 2 * D integers of one."""
        return _layout(width).itemsize

    def encode(self, embeddings: Sequence[bytes], width: int) -> list[bytes]:
        """See the protocol. A row of zeros has the scale 0."""
        rows = np.frombuffer(b"".join(embeddings), _F16).reshape(-1, _ROWS, width).astype(np.float32)
        values = np.empty(len(rows), _layout(width))
        values["scale"] = scale = np.abs(rows).max(axis=2) / np.float32(_LARGEST)
        rows /= np.where(scale > 0, scale, 1)[:, :, None]
        values["rows"] = np.rint(rows, out=rows)
        return _split(values)

    def decode(self, values: Sequence[bytes], width: int) -> list[bytes]:
        """See the protocol."""
        held = np.frombuffer(b"".join(values), _layout(width))
        rows = held["rows"].astype(np.float32)
        rows *= held["scale"][:, :, None]
        return _split(rows.astype(_F16))


def _layout(width: int) -> np.dtype[np.void]:
    return np.dtype([("scale", _SCALE, (_ROWS,)), ("rows", np.int8, (_ROWS, width))])


def _split(rows: npt.NDArray[np.generic]) -> list[bytes]:
    """The bytes of each entry of the first axis."""
    data = rows.tobytes()
    size = len(data) // max(len(rows), 1)
    return [data[start : start + size] for start in range(0, len(data), size)] if data else []


def encoded(codec: EmbeddingCodec, values: Mapping[str, bytes], reference: ReferenceInfo) -> dict[str, bytes]:
    """Return each key's value for the cache.

    Raises:
        ValueError: If an embedding is not finite: it would poison its key until it is evicted.
    """
    if not is_finite(b"".join(values.values())):
        broken = next(key for key, value in values.items() if not is_finite(value))
        raise ValueError(f"the embedding of {broken!r} is not finite")
    return dict(zip(values, codec.encode(list(values.values()), reference.embedding_width), strict=True))


def is_finite(embeddings: bytes) -> bool:
    """Return whether all of these f16 numbers are finite."""
    return bool(np.isfinite(np.frombuffer(embeddings, _F16)).all())


def decoded(codec: EmbeddingCodec, values: Sequence[bytes | None], reference: ReferenceInfo) -> list[bytes | None]:
    """The embeddings of each value that has the right size; None for every other."""
    size = codec.value_bytes(reference.embedding_width)
    whole = [value if value is not None and len(value) == size else None for value in values]
    found = iter(codec.decode([value for value in whole if value is not None], reference.embedding_width))
    return [None if value is None else next(found) for value in whole]


CODECS: Final[dict[Precision, EmbeddingCodec]] = {"float16": Float16Codec(), "int8": Int8Codec()}
