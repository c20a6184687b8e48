"""Reads every file of embeddings again and tells what is wrong with it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from jest_server.stores.embedding_files.folder import EmbeddingFolder, spaces_in
from jest_server.stores.embedding_files.format import EmbeddingFileError, Manifest, checksum_of, index_of

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Verified:
    """What was read, and what is wrong."""

    files: int = 0
    rows: int = 0
    problems: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    """Files that no manifest names: left by a run that was killed, and safe to delete while none is running."""


def verify(output: str, on_file: Callable[[str], None] = lambda _: None) -> Verified:
    """Holds every file of every model below ``output`` against its manifest.

    Args:
        output: What ``jest-server embed --output`` was given.
        on_file: Told each file's name before it is read.

    Raises:
        ValueError: If nothing here can read such a URL.
    """
    verified = Verified()
    spaces = spaces_in(output)
    if not spaces:
        verified.problems.append(f"{output}: has no embeddings in it")
    for space in spaces:
        folder = EmbeddingFolder(output, space)
        named = set()
        for name in sorted(folder.stamps()):
            on_file(f"{space}/{name}")
            try:
                manifest = folder.manifest(name)
                if manifest is None:
                    raise EmbeddingFileError(f"{name}: went away")  # noqa: TRY301 - one place tells of all problems
                named.add(manifest.file)
                _check(folder, manifest, name)
                verified.files += 1
                verified.rows += manifest.rows
            except Exception as error:  # noqa: BLE001 - every kind of store raises errors of its own
                detail = str(error) if isinstance(error, EmbeddingFileError) else f"{name}: {error!r}"
                verified.problems.append(f"{space}/{detail}")
        verified.unnamed += [f"{space}/{name}" for name in sorted(folder.data_files() - named)]
    return verified


def _check(folder: EmbeddingFolder, manifest: Manifest, name: str) -> None:
    (data,) = folder.ranges([(manifest.file, None, None)])
    if isinstance(data, Exception):
        raise EmbeddingFileError(f"{name}: file {manifest.file} cannot be read: {data!r}") from data
    where = f"{name}: file {manifest.file}"
    if len(data) != manifest.bytes:
        raise EmbeddingFileError(f"{where}: has {len(data)} bytes, expected {manifest.bytes}")
    if checksum_of(data) != manifest.checksum:
        raise EmbeddingFileError(f"{where}: checksum is {checksum_of(data)}, expected {manifest.checksum}")
    layout = manifest.layout
    _, checksums = index_of(data[: layout.index_bytes], manifest, name)
    rows = np.frombuffer(data, "<f2", offset=layout.index_bytes).reshape(manifest.rows, 2, manifest.width)
    unsound = [row for row, value in enumerate(rows) if zlib.crc32(value) != checksums[row]]
    if unsound:
        raise EmbeddingFileError(f"{where}: {len(unsound)} rows have wrong checksums, first row {unsound[0]}")
    finite = np.isfinite(rows).all(axis=(1, 2))
    if not finite.all():
        raise EmbeddingFileError(
            f"{where}: {(~finite).sum()} rows hold NaN or infinity, expected finite ones; first row {np.argmin(finite)}"
        )
