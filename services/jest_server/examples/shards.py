"""Data sets as input shards: WebDataset tars and folders of pictures, on a local disk or wherever fsspec reads.

Tars are read from front to back, nothing is written to disk, and no more of a file is read than the options allow.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from jest_server.examples.decoding import PICTURES, LeftOut, RawExample, is_wanted, split_name
from jest_server.examples.options import expand_braces
from jest_server.stores.embedding_files.folder import file_system

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fsspec import AbstractFileSystem

    from jest_server.examples.options import EmbedOptions

_TARS = (".tar", ".tar.gz", ".tgz")
_GLOB = ("*", "?", "[")


class UnreadableShard(Exception):
    """The input shard cannot be read to its end; the message tells where and why."""


class InputShard(Protocol):
    """A part of the data set that is embedded, written and resumed as one."""

    @property
    def source(self) -> str:
        """Its URL, the same wherever the command is started."""

    @property
    def name(self) -> str:
        """What ``{shard}`` stands for in keys."""

    def size(self) -> int:
        """Returns its size in bytes.

        Raises:
            UnreadableShard: If it is not there.
        """

    def examples(self) -> Iterator[RawExample]:
        """Reads it from front to back.

        Raises:
            UnreadableShard: If it cannot be read to its end.
        """


@dataclass(frozen=True)
class TarShard:
    """One WebDataset tar: an example is the members that follow each other and share a name up to the first dot."""

    files: AbstractFileSystem
    path: str
    source: str
    options: EmbedOptions

    @property
    def name(self) -> str:
        """The file's name up to the first dot."""
        return split_name(self.path)[0].rpartition("/")[2]

    def size(self) -> int:
        """See the protocol."""
        try:
            return int(self.files.info(self.path)["size"])
        except Exception as error:
            raise UnreadableShard(f"{self.source}: {error!r}") from error

    def examples(self) -> Iterator[RawExample]:
        """See the protocol."""
        try:
            with (
                self.files.open(self.path, "rb") as file,
                tarfile.open(fileobj=file, mode="r|*", tarinfo=_StrictTarInfo) as tar,
            ):
                yield from self._grouped(tar)
        except Exception as error:
            raise UnreadableShard(f"{self.source}: {error!r}") from error

    def _grouped(self, tar: tarfile.TarFile) -> Iterator[RawExample]:
        example = None
        for member in tar:
            key, extension = split_name(member.name)
            if member.isdir():
                continue
            if not key.rpartition("/")[2] or not extension:
                yield RawExample(key, problem=LeftOut(member.name, "not named as an example", "expected KEY.EXTENSION"))
                continue
            if example is None or example.key != key:
                if example is not None:
                    yield example
                example = RawExample(key)
            self._add(example, extension, member, tar)
        if example is not None:
            yield example

    def _add(self, example: RawExample, extension: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        if not is_wanted(extension, self.options.caption):
            return
        problem = _problem(member, self.options.max_member_bytes)
        if extension in example.files:
            problem = LeftOut(member.name, "repeated file", "two members of one name")
        if problem is not None:
            example.problem = problem
            return
        content = tar.extractfile(member)
        assert content is not None, "a regular file has content"
        example.files[extension] = content.read()


def _problem(member: tarfile.TarInfo, limit: int) -> LeftOut | None:
    if not member.isfile():
        return LeftOut(member.name, "not a regular file", f"is a tar member of type {member.type!r}")
    if member.size > limit:
        return LeftOut(member.name, "file too large", f"has {member.size} bytes, expected up to {limit}")
    return None


class _StrictTarInfo(tarfile.TarInfo):
    """Takes a damaged or missing header for what it is; tarfile itself takes it for the archive's end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _StrictTarInfo:
        """Reads the next header."""
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the types forgot it
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(
                f"ends without an end, or has a damaged header at byte {tarfile_.offset}"
            ) from error


@dataclass(frozen=True)
class FolderShard:
    """Some of a folder's pictures, each with a caption in a file of the same name."""

    files: AbstractFileSystem
    folder: str
    sizes: dict[str, int]
    """Of each file of these examples, by path; examples lie together."""
    source: str
    name: str
    options: EmbedOptions

    def size(self) -> int:
        """See the protocol."""
        return sum(self.sizes.values())

    def examples(self) -> Iterator[RawExample]:
        """See the protocol."""
        example = None
        for path in self.sizes:
            key, extension = split_name(path.removeprefix(self.folder).lstrip("/"))
            if example is None or example.key != key:
                if example is not None:
                    yield example
                example = RawExample(key)
            self._add(example, extension, path)
        if example is not None:
            yield example

    def _add(self, example: RawExample, extension: str, path: str) -> None:
        limit = self.options.max_member_bytes
        if self.sizes[path] > limit:
            detail = f"has {self.sizes[path]} bytes, expected up to {limit}"
            example.problem = LeftOut(path, "file too large", detail)
            return
        try:
            example.files[extension] = self.files.cat_file(path)
        except Exception as error:  # noqa: BLE001 - every kind of store raises errors of its own
            example.problem = LeftOut(path, "file unreadable", repr(error)[:200])


def input_shards(options: EmbedOptions) -> list[InputShard]:
    """Returns the input shards that are this process's to embed.

    Raises:
        ValueError: If ``--data`` names nothing that can be read as a data set.
    """
    shards: list[InputShard] = []
    for url in expand_braces(options.data):
        files, path = _reader(url)
        if url.endswith(_TARS):
            paths = sorted(files.glob(path)) if any(sign in path for sign in _GLOB) else [path]
            shards += [TarShard(files, each, files.unstrip_protocol(each), options) for each in paths]
        elif files.isdir(path):
            shards += _folder_shards(files, path.rstrip("/"), options)
        else:
            raise ValueError(f"--data is {url!r}, expected a folder, or names that end in {', '.join(_TARS)}")
    if not shards:
        raise ValueError(f"--data is {options.data!r}, which matches no file and no picture")
    return shards[options.shard_index :: options.num_shards]


def _reader(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        return file_system(url)
    except ValueError as error:
        raise ValueError(f"--data: {error}") from error


def _folder_shards(files: AbstractFileSystem, folder: str, options: EmbedOptions) -> list[FolderShard]:
    found = {str(path): int(entry["size"]) for path, entry in files.find(folder, detail=True).items()}
    examples: dict[str, dict[str, int]] = {}
    for path in sorted(found):
        key, extension = split_name(path)
        if is_wanted(extension, options.caption):
            examples.setdefault(key, {})[path] = found[path]
    pictured = [sizes for sizes in examples.values() if any(split_name(path)[1] in PICTURES for path in sizes)]
    source, step = files.unstrip_protocol(folder), options.folder_shard_examples
    return [
        FolderShard(
            files,
            folder,
            {path: size for sizes in pictured[start : start + step] for path, size in sizes.items()},
            source=f"{source}#{start // step:05}",
            name=f"{start // step:05}",
            options=options,
        )
        for start in range(0, len(pictured), step)
    ]
