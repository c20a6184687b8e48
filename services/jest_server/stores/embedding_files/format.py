"""How reference embeddings lie in files: one safetensors file and one manifest for each shard of the data set.

    ROOT/MODEL-SPACE/SHARD-DIGEST.json                       the manifest; a shard counts from when it is there
    ROOT/MODEL-SPACE/SHARD-DIGEST.CHECKSUM.safetensors       what it names; never changed, only replaced by another

SPACE digests model name, version and preprocessing id. A file's rows are sorted by the digests of their example keys,
and the digests come first, so that whoever looks rows up reads them and no embedding that nobody asked for.

Shapes: n = rows, D = embedding width.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import Field, StringConstraints, ValidationError

from jest_server.domain.frozen_model import FrozenModel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_server.domain.references import ReferenceInfo

MANIFEST_SUFFIX = ".json"
DATA_SUFFIX = ".safetensors"
DIGEST_BYTES = 16
_CHECKSUM_BYTES = 4
_LENGTH_BYTES = 8
_NAME_DIGITS = 16

Checksum = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
"""XXH3-128."""
Digests = npt.NDArray[np.uint8]
"""``[n, 16]``: BLAKE2b-128 of each example key."""
Checksums = npt.NDArray[np.uint32]
"""``[n]``: CRC-32 of each row's bytes."""


class EmbeddingFileError(Exception):
    """A file or manifest is not what it has to be; the message names it, what is wrong, and what was expected."""


class Origin(FrozenModel):
    """Where a shard's embeddings come from: rows of other origins are never taken for these."""

    model: str
    version: str
    preprocessing_id: str
    width: int = Field(ge=1)
    source: str
    """URL of the input shard."""
    source_bytes: int = Field(ge=0)
    key: str
    """How example keys were made; see ``jest-server embed --key``."""
    caption: str
    """Where captions were found; see ``--caption``."""

    def is_of(self, reference: ReferenceInfo) -> bool:
        """Whether the rows are this model's, of this version and preprocessing."""
        own = (self.model, self.version, self.preprocessing_id, self.width)
        return own == (reference.name, reference.version, reference.preprocessing_id, reference.embedding_width)


class Manifest(Origin):
    """What is known of one file of embeddings; written after it."""

    format_version: Literal[1] = 1
    file: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+\.safetensors$")]
    """In the manifest's own folder."""
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    checksum: Checksum
    """Of the whole file."""
    index_checksum: Checksum
    """Of all that comes before the embeddings."""
    smallest_digest: str
    """Hexadecimal, as the next; empty if there are no rows."""
    largest_digest: str
    preprocess: str
    """Name of the function that made the model's inputs."""
    left_out: dict[str, int]
    """Examples of the input shard that have no row, by reason."""

    @property
    def layout(self) -> Layout:
        """Where everything is in the file."""
        return Layout(self.rows, self.width)


@dataclass(frozen=True)
class Layout:
    """Where everything is in a file of ``rows`` rows of ``width``; nothing else is valid in this format version."""

    rows: int
    width: int

    @property
    def header(self) -> bytes:
        """The safetensors header, its length in front."""
        digests_end = self.rows * DIGEST_BYTES
        checksums_end = digests_end + self.rows * _CHECKSUM_BYTES
        description = {
            "__metadata__": {"format": "jest_embeddings", "format_version": "1"},
            "digests": _tensor("U8", [self.rows, DIGEST_BYTES], 0, digests_end),
            "checksums": _tensor("U32", [self.rows], digests_end, checksums_end),
            "embeddings": _tensor(
                "F16", [self.rows, 2, self.width], checksums_end, checksums_end + self.rows * self.row_bytes
            ),
        }
        text = json.dumps(description, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text

    @property
    def row_bytes(self) -> int:
        """Size of one example's embeddings, ``[2, D]`` f16."""
        return 2 * 2 * self.width

    @property
    def index_bytes(self) -> int:
        """Where the embeddings begin."""
        return len(self.header) + self.rows * (DIGEST_BYTES + _CHECKSUM_BYTES)

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.index_bytes + self.rows * self.row_bytes


def _tensor(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def space_of(reference: ReferenceInfo) -> str:
    """Names the folder of a model at one version and preprocessing."""
    names = (reference.name, reference.version, reference.preprocessing_id)
    return _named(reference.name, "\0".join(names))


def shard_of(source: str) -> str:
    """Names the files of an input shard, apart from all other input shards'."""
    last = source.rstrip("/").rpartition("/")[2]
    return _named(last, source)


def _named(readable: str, whole: str) -> str:
    digest = blake2b(whole.encode(), digest_size=_NAME_DIGITS // 2).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', readable)[:64]}-{digest}"


def digests_of(keys: Sequence[str]) -> Digests:
    """Digests example keys."""
    joined = b"".join(blake2b(key.encode(), digest_size=DIGEST_BYTES).digest() for key in keys)
    return np.frombuffer(joined, np.uint8).reshape(-1, DIGEST_BYTES)


def halves(digests: Digests) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Splits digests into two numbers each, whose order is that of the bytes."""
    numbers = np.ascontiguousarray(digests).view(">u8").astype(np.uint64)
    return numbers[:, 0], numbers[:, 1]


def pack(
    origin: Origin,
    keys: Sequence[str],
    embeddings: npt.NDArray[np.float16],
    *,
    preprocess: str,
    left_out: Mapping[str, int],
) -> tuple[Manifest, bytes]:
    """Makes a shard's file and the manifest for it.

    Args:
        origin: Where the rows come from.
        keys: Different ones.
        embeddings: ``[n, 2, D]``, image before text.
        preprocess: Name of the function that made the model's inputs.
        left_out: Examples that have no row, by reason.
    """
    digests = digests_of(keys)
    high, low = halves(digests)
    order = np.lexsort((low, high))
    digests = digests[order]
    values = np.ascontiguousarray(embeddings[order], "<f2")
    checksums = np.array([zlib.crc32(row) for row in values], "<u4")
    layout = Layout(len(keys), origin.width)
    data = b"".join((layout.header, digests.tobytes(), checksums.tobytes(), values.tobytes()))
    smallest, largest = _ends(digests)
    checksum = checksum_of(data)
    manifest = Manifest(
        **origin.model_dump(),
        file=f"{shard_of(origin.source)}.{checksum[:_NAME_DIGITS]}{DATA_SUFFIX}",
        rows=len(keys),
        bytes=len(data),
        checksum=checksum,
        index_checksum=checksum_of(data[: layout.index_bytes]),
        smallest_digest=smallest,
        largest_digest=largest,
        preprocess=preprocess,
        left_out=dict(left_out),
    )
    return manifest, data


def index_of(data: bytes, manifest: Manifest, name: str) -> tuple[Digests, Checksums]:
    """Reads all of a file that comes before the embeddings.

    Raises:
        EmbeddingFileError: If it is not what the manifest called ``name`` says.
    """
    layout = manifest.layout
    where = f"file {manifest.file} of {name}"
    if manifest.bytes != layout.file_bytes:
        raise EmbeddingFileError(f"{name}: bytes is {manifest.bytes}, expected {layout.file_bytes} for its rows")
    if len(data) != layout.index_bytes:
        raise EmbeddingFileError(f"{where}: ends after {len(data)} bytes, expected at least {layout.index_bytes}")
    if checksum_of(data) != manifest.index_checksum:
        raise EmbeddingFileError(f"{where}: index checksum is {checksum_of(data)}, expected {manifest.index_checksum}")
    start = len(layout.header)
    if data[:start] != layout.header:
        raise EmbeddingFileError(f"{where}: header is {data[:start]!r}, expected {layout.header!r}")
    digests = np.frombuffer(data, np.uint8, manifest.rows * DIGEST_BYTES, start).reshape(-1, DIGEST_BYTES)
    checksums = np.frombuffer(data, "<u4", manifest.rows, start + digests.size).astype(np.uint32)
    high, low = halves(digests)
    if not ((high[:-1] < high[1:]) | ((high[:-1] == high[1:]) & (low[:-1] < low[1:]))).all():
        raise EmbeddingFileError(f"{where}: digests are not in order, expected ascending ones without repeats")
    if _ends(digests) != (manifest.smallest_digest, manifest.largest_digest):
        raise EmbeddingFileError(
            f"{name}: smallest_digest and largest_digest are {manifest.smallest_digest} and {manifest.largest_digest}, "
            f"expected those of the file: {' and '.join(_ends(digests))}"
        )
    return digests, checksums


def _ends(digests: Digests) -> tuple[str, str]:
    """The first and the last digest."""
    return (digests[0].tobytes().hex(), digests[-1].tobytes().hex()) if len(digests) else ("", "")


def checksum_of(data: bytes) -> str:
    """XXH3-128."""
    return xxhash.xxh3_128_hexdigest(data)


def read_manifest(text: bytes, name: str) -> Manifest:
    """Reads a manifest.

    Raises:
        EmbeddingFileError: Naming manifest, field, value and expectation.
    """
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise EmbeddingFileError(f"{name}: {field} is {str(first['input'])[:100]!r}: {first['msg']}") from error
