"""Examples read by reference: pictures with captions, and members of WebDataset tars, wherever fsspec reads.

Nothing outside the allowed prefixes is opened: not by a URL, not by a link in a folder, not by a redirect.
"""

from __future__ import annotations

import asyncio
import tarfile
import threading
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.http import HTTPFileSystem
from fsspec.implementations.local import LocalFileSystem

from jest_server.domain.errors import UnreadableSource
from jest_server.examples.decoding import PICTURES, Example, LeftOut, RawExample, example_of, is_wanted, split_name
from jest_server.examples.preprocessing import ExamplesRefused, Preprocessing, PreprocessingError, load_function

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from fsspec import AbstractFileSystem

    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.sources import AllowedSources, Source
    from jest_server.examples.options import EmbedOptions

ATTEMPTS = 3
RETRY_S = 0.2
TARS_KNOWN = 256
"""Tars whose list of members is remembered; the ones used longest ago are forgotten."""
_HTTP = ("http", "https")

Member = tuple[int, int]
"""Where a member's bytes begin in its tar, and how many they are."""


class _NoRedirects(HTTPFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Takes an answer that points elsewhere for a refusal: where it points, nobody has allowed."""

    protocol = _HTTP

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_redirects=False)

    def _raise_not_found_for_status(self, response: Any, url: str) -> None:
        if 300 <= response.status < 400:
            raise PermissionError(f"{url} answers with a redirect, which is not followed")
        super()._raise_not_found_for_status(response, url)


class SourceReader:
    """Reads examples and makes the reference model's inputs of them; blocking work runs in threads.

    Args:
        allowed: what may be read.
        options: where captions are, how large a file may be, and the function that makes inputs.

    Raises:
        ValueError: If the function cannot be imported.
    """

    def __init__(self, allowed: AllowedSources, options: EmbedOptions) -> None:
        self._allowed = allowed
        self._options = options
        self._function = load_function(options.preprocess)
        self._tars: OrderedDict[str, dict[str, dict[str, Member]]] = OrderedDict()
        self._lock = threading.Lock()

    async def inputs(self, reference: ReferenceInfo, sources: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Returns the model's inputs, ``[n, ...]`` by name.

        Raises:
            UnreadableSource: If an example cannot be read, or the function does not take it.
        """
        return await asyncio.to_thread(self._inputs, reference, sources)

    def _inputs(self, reference: ReferenceInfo, sources: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        examples = [self._example(text) for text in sources]
        try:
            return Preprocessing(self._options.preprocess, self._function, reference)(examples)
        except (ExamplesRefused, PreprocessingError) as error:
            raise UnreadableSource("PREPROCESSING_FAILED", str(error)) from error

    def _example(self, text: str) -> Example:
        try:
            source = self._allowed.check(text)
        except ValueError as error:
            raise UnreadableSource("SOURCE_NOT_ALLOWED", f"source {error}") from error
        raw = self._patiently(partial(self._read, source), text)
        found = example_of(raw, self._options, shard="")
        if isinstance(found, LeftOut):
            raise UnreadableSource("SOURCE_UNREADABLE", f"source {text!r}: {found.reason}: {found.detail}")
        return found

    def _patiently(self, read: Any, text: str) -> RawExample:
        """Reads, again if a store fails for a moment."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                raw: RawExample = read()
            except (FileNotFoundError, KeyError, PermissionError, ValueError, tarfile.TarError) as error:
                raise UnreadableSource("SOURCE_UNREADABLE", f"source {text!r}: {error!r}") from error
            except Exception as error:  # every kind of store raises errors of its own
                if attempt == ATTEMPTS:
                    raise UnreadableSource("SOURCE_UNREADABLE", f"source {text!r}: {error!r}") from error
                threading.Event().wait(attempt * RETRY_S)
            else:
                return raw
        raise AssertionError("the last attempt returns or raises")

    def _read(self, source: Source) -> RawExample:
        files, path = _open(source.url)
        if isinstance(files, LocalFileSystem):
            self._require_inside(path)
        return self._picture(files, path) if source.member is None else self._member(files, path, source)

    def _picture(self, files: AbstractFileSystem, path: str) -> RawExample:
        key, extension = split_name(path)
        if extension not in PICTURES:
            raise ValueError(f"ends in .{extension}, expected one of {', '.join(PICTURES)}, or .tar#KEY")
        form = self._options.caption.partition(":")[0]
        caption = f"{path[: -len(extension)]}{form}"
        return RawExample(key, {extension: self._limited(files, path), form: self._limited(files, caption)})

    def _limited(self, files: AbstractFileSystem, path: str) -> bytes:
        if isinstance(files, LocalFileSystem):
            self._require_inside(path)
        limit = self._options.max_member_bytes
        data: bytes = files.cat_file(path, start=0, end=limit + 1)
        if len(data) > limit:
            raise ValueError(f"{path} has more than {limit} bytes")
        return data

    def _member(self, files: AbstractFileSystem, path: str, source: Source) -> RawExample:
        members = self._members(files, path, source.url)
        if source.member not in members:
            raise KeyError(f"the tar has no example {source.member!r}")
        held = members[source.member]
        for extension, (_, size) in held.items():
            if size > self._options.max_member_bytes:
                raise ValueError(f".{extension} has {size} bytes, expected up to {self._options.max_member_bytes}")
        read = {ext: files.cat_file(path, start=start, end=start + size) for ext, (start, size) in held.items()}
        if any(len(read[extension]) != size for extension, (_, size) in held.items()):
            raise ValueError("the store does not read parts of files, or the tar has changed")
        return RawExample(source.member, read)

    def _members(self, files: AbstractFileSystem, path: str, url: str) -> dict[str, dict[str, Member]]:
        """What is where in a tar: its headers are read once, its members not at all."""
        with self._lock:
            if url in self._tars:
                self._tars.move_to_end(url)
                return self._tars[url]
        members: dict[str, dict[str, Member]] = {}
        with files.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, extension = split_name(member.name)
                if member.isfile() and is_wanted(extension, self._options.caption):
                    members.setdefault(key, {})[extension] = (member.offset_data, member.size)
        with self._lock:
            self._tars[url] = members
            while len(self._tars) > TARS_KNOWN:
                self._tars.popitem(last=False)
        return members

    def _require_inside(self, path: str) -> None:
        """Refuses a local path that a link leads out of where it seems to be.

        Raises:
            PermissionError: If it does.
        """
        try:
            self._allowed.check_local(Path(path).resolve())
        except ValueError:
            raise PermissionError(f"{path} leads out of the allowed folders") from None


def _open(url: str) -> tuple[AbstractFileSystem, str]:
    if url.startswith(tuple(f"{scheme}://" for scheme in _HTTP)):
        return _NoRedirects(), url
    files, path = fsspec.core.url_to_fs(url)
    return files, str(path)
