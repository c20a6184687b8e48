"""A folder of embedding files through fsspec: on a local disk, s3://, gs://, or memory:// in tests.

Nothing is ever half there. A local file is written under a temporary name, synced and renamed; an object store shows
an upload when it is complete. The manifest comes last, and without one a file does not count.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec.core
from fsspec.implementations.local import LocalFileSystem

from jest_server.stores.embedding_files.format import (
    DATA_SUFFIX,
    MANIFEST_SUFFIX,
    EmbeddingFileError,
    read_manifest,
    shard_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import FileIO

    from fsspec import AbstractFileSystem

    from jest_server.stores.embedding_files.format import Manifest

_PARTIAL_SUFFIX = ".partial"

Range = tuple[str, int | None, int | None]
"""A file's name, and where to begin and to stop reading; None: at its ends."""


class EmbeddingFolder:
    """All shards of one model space, or of none yet."""

    def __init__(self, root: str, space: str) -> None:
        """Names the folder; nothing is read or made.

        Raises:
            ValueError: If nothing here can read such a URL.
        """
        self._files, path = file_system(root)
        self._is_local = isinstance(self._files, LocalFileSystem)
        self._folder = f"{path.rstrip('/')}/{space}"
        self.url = f"{root.rstrip('/')}/{space}"

    def stamps(self) -> dict[str, str]:
        """Returns the names of all manifests, each with something that changes when the manifest does."""
        self._files.invalidate_cache()  # other processes write here
        try:
            entries = self._files.ls(self._folder, detail=True)
        except FileNotFoundError:
            return {}
        return {
            name: repr(sorted((field, str(value)) for field, value in entry.items()))
            for entry in entries
            if (name := _last(entry["name"])).endswith(MANIFEST_SUFFIX)
        }

    def data_files(self) -> set[str]:
        """Returns the names of all files of embeddings, whether a manifest names them or not."""
        names = map(_last, self._files.ls(self._folder, detail=False))
        return {name for name in names if name.endswith(DATA_SUFFIX)}

    def manifest(self, shard: str) -> Manifest | None:
        """Reads a shard's manifest, if there is one.

        Raises:
            EmbeddingFileError: If it is none.
        """
        name = shard.removesuffix(MANIFEST_SUFFIX) + MANIFEST_SUFFIX
        try:
            text = self._files.cat_file(f"{self._folder}/{name}")
        except FileNotFoundError:
            return None
        return read_manifest(text, name)

    def content(self, manifest: Manifest) -> bytes:
        """Reads a shard's whole file."""
        data: bytes = self._files.cat_file(f"{self._folder}/{manifest.file}")
        return data

    def ranges(self, ranges: Sequence[Range]) -> list[bytes | Exception]:
        """Reads parts of files, or tells for each why not; one that the file does not hold to its end is shorter."""
        paths = [f"{self._folder}/{name}" for name, _, _ in ranges]
        if self._is_local:
            return _local_ranges(paths, ranges)
        starts, stops = [start for _, start, _ in ranges], [stop for _, _, stop in ranges]
        read: list[bytes | Exception] = self._files.cat_ranges(paths, starts, stops, on_error="return")
        return read

    def write(self, manifest: Manifest, data: bytes) -> None:
        """Writes a shard, or puts it in the place of an earlier one."""
        shard = shard_of(manifest.source)
        try:
            earlier = self.manifest(shard)
        except EmbeddingFileError:
            earlier = None
        self._put(manifest.file, data)
        self._put(shard + MANIFEST_SUFFIX, manifest.model_dump_json(indent=1).encode())
        if earlier is not None and earlier.file != manifest.file:
            with suppress(FileNotFoundError):
                self._files.rm_file(f"{self._folder}/{earlier.file}")

    def _put(self, name: str, data: bytes) -> None:
        path = f"{self._folder}/{name}"
        if self._is_local:
            _put_local(Path(path), data)
        else:
            self._files.pipe_file(path, data)


def spaces_in(root: str) -> list[str]:
    """Returns the names of all folders in ``root``.

    Raises:
        ValueError: If nothing here can read such a URL.
    """
    files, path = file_system(root)
    files.invalidate_cache()
    try:
        entries = files.ls(path, detail=True)
    except FileNotFoundError:
        return []
    return sorted(_last(entry["name"]) for entry in entries if entry["type"] == "directory")


def file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """Returns what reads a URL, and the path in there.

    Raises:
        ValueError: If nothing here can read such a URL.
    """
    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url!r} is no path or URL that can be read here: {error}") from error
    return files, str(path)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _local_ranges(paths: Sequence[str], ranges: Sequence[Range]) -> list[bytes | Exception]:
    """Reads, instead of mapping files into memory: a disk that fails raises an error then, and ends no process."""
    read: list[bytes | Exception] = []
    for path, same in groupby(zip(paths, ranges, strict=True), key=itemgetter(0)):
        wanted = [(start or 0, stop) for _, (_, start, stop) in same]
        try:
            with Path(path).open("rb", buffering=0) as file:
                pieces = [_piece(file, start, stop) for start, stop in wanted]
        except OSError as error:
            read += [error] * len(wanted)
        else:
            read += pieces
    return read


def _piece(file: FileIO, start: int, stop: int | None) -> bytes:
    file.seek(start)
    return (file.readall() if stop is None else file.read(stop - start)) or b""


def _put_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL_SUFFIX}")
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, outlives a power cut
    finally:
        os.close(folder)
