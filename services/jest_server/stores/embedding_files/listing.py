"""What one model's folder of embedding files holds at a moment, and reading rows of it; everything here blocks."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from jest_server.domain.embedding_codec import is_finite
from jest_server.stores.embedding_files.format import EmbeddingFileError, digests_of, index_of, read_manifest
from jest_server.stores.embedding_files.index import DigestIndex

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jest_server.domain.references import ReferenceInfo
    from jest_server.stores.embedding_files.folder import EmbeddingFolder
    from jest_server.stores.embedding_files.format import Checksums, Digests, Manifest
    from jest_server.stores.embedding_files.index import Alive, Found

    Problem = Callable[[str, str], None]
    """Told what kind of thing cannot be used, and the details."""

_GAP_BYTES = 32 << 10
"""Rows that are so near to each other are read in one go."""
_RANGE_BYTES = 8 << 20
_AT_ONCE = 256
"""Manifests, or ranges of rows, that are asked for together."""


@dataclass(frozen=True)
class Listing:
    """Replaced, never changed, so that threads may read while the next one is made."""

    folder: EmbeddingFolder
    stamps: dict[str, str] = field(default_factory=dict)
    """By manifest name; changes with the manifest."""
    numbers: dict[str, int] = field(default_factory=dict)
    """By manifest name: which of ``files`` it tells of."""
    files: tuple[Manifest | None, ...] = ()
    """None: gone, or replaced."""
    index: DigestIndex = field(default_factory=DigestIndex)

    def refreshed(self, reference: ReferenceInfo, problem: Problem) -> Listing:
        """Returns what is there now; shards that cannot be used are told and tried again the next time."""
        stamps = self.folder.stamps()
        if stamps == self.stamps:
            return self
        files, numbers = list(self.files), dict(self.numbers)
        for name in [name for name in numbers if stamps.get(name) != self.stamps[name]]:
            files[numbers.pop(name)] = None
        added: dict[int, tuple[Digests, Checksums]] = {}
        for name, manifest, index in self._new(sorted(stamps.keys() - numbers.keys()), reference, problem):
            numbers[name] = len(files)
            added[len(files)] = index
            files.append(manifest)
        known = {name: stamps[name] for name in numbers}
        return Listing(self.folder, known, numbers, tuple(files), self.index.with_files(added, _alive(files)))

    def read(self, keys: Sequence[str], problem: Problem) -> list[bytes | None]:
        """Returns each key's row, ``[2, D]`` f16 bytes, or None if there is none that can be read."""
        found = self.index.find(digests_of(keys), _alive(self.files))
        values: list[bytes | None] = [None] * len(keys)
        groups = list(self._groups(found))
        problem = _once_for_each(problem)
        for start in range(0, len(groups), _AT_ONCE):
            some = groups[start : start + _AT_ONCE]
            ranges = [self._range(found, group) for group in some]
            for group, (name, _, _), data in zip(some, ranges, self.folder.ranges(ranges), strict=True):
                if isinstance(data, Exception):
                    problem("read", f"{name}: {data}")
                else:
                    self._cut(found, group, data, values, problem)
        return values

    def _new(
        self, names: Sequence[str], reference: ReferenceInfo, problem: Problem
    ) -> Iterator[tuple[str, Manifest, tuple[Digests, Checksums]]]:
        for start in range(0, len(names), _AT_ONCE):
            some = names[start : start + _AT_ONCE]
            manifests: dict[str, Manifest] = {}
            for name, text in zip(some, self.folder.ranges([(name, None, None) for name in some]), strict=True):
                try:
                    manifests[name] = _usable(read_manifest(_whole(text), name), name, reference)
                except EmbeddingFileError as error:
                    problem("manifest", str(error))
            ranges = [(each.file, 0, each.layout.index_bytes) for each in manifests.values()]
            for (name, manifest), data in zip(manifests.items(), self.folder.ranges(ranges), strict=True):
                try:
                    yield name, manifest, index_of(_whole(data), manifest, name)
                except EmbeddingFileError as error:
                    problem("index", str(error))

    def _groups(self, found: Found) -> Iterator[list[int]]:
        """Puts positions together whose rows lie near to each other in one file, in the order of the rows."""
        there = np.flatnonzero(found.file >= 0)
        order = there[np.lexsort((found.row[there], found.file[there]))].tolist()
        group: list[int] = []
        for at in order:
            if group and not self._near(found, group, at):
                yield group
                group = []
            group.append(at)
        if group:
            yield group

    def _near(self, found: Found, group: list[int], at: int) -> bool:
        row_bytes = self._manifest(found, at).layout.row_bytes
        return bool(
            found.file[group[0]] == found.file[at]
            and (found.row[at] - found.row[group[-1]]) * row_bytes <= _GAP_BYTES
            and (found.row[at] - found.row[group[0]]) * row_bytes <= _RANGE_BYTES
        )

    def _range(self, found: Found, group: list[int]) -> tuple[str, int, int]:
        manifest = self._manifest(found, group[0])
        begin, size = manifest.layout.index_bytes, manifest.layout.row_bytes
        return manifest.file, begin + int(found.row[group[0]]) * size, begin + (int(found.row[group[-1]]) + 1) * size

    def _cut(self, found: Found, group: list[int], data: bytes, values: list[bytes | None], problem: Problem) -> None:
        size = self._manifest(found, group[0]).layout.row_bytes
        for at in group:
            start = int(found.row[at] - found.row[group[0]]) * size
            value = data[start : start + size]
            if zlib.crc32(value) != found.checksum[at]:
                problem("checksum", f"{self._manifest(found, at).file}: has damaged rows")
            elif not is_finite(value):
                problem("not_finite", f"{self._manifest(found, at).file}: has rows with NaN or infinity")
            else:
                values[at] = value

    def _manifest(self, found: Found, at: int) -> Manifest:
        manifest = self.files[int(found.file[at])]
        assert manifest is not None, "only living files are found"
        return manifest


def _alive(files: Sequence[Manifest | None]) -> Alive:
    return np.array([manifest is not None for manifest in files], np.bool_)


def _usable(manifest: Manifest, name: str, reference: ReferenceInfo) -> Manifest:
    if not manifest.is_of(reference):
        raise EmbeddingFileError(
            f"{name}: model, version, preprocessing id and width are {manifest.model}, {manifest.version}, "
            f"{manifest.preprocessing_id}, {manifest.width}, expected {reference.name}, {reference.version}, "
            f"{reference.preprocessing_id}, {reference.embedding_width}"
        )
    return manifest


def _whole(data: bytes | Exception) -> bytes:
    if isinstance(data, Exception):
        raise EmbeddingFileError(repr(data)) from data
    return data


def _once_for_each(problem: Problem) -> Problem:
    """Tells the same only once."""
    told: set[tuple[str, str]] = set()

    def tell(kind: str, detail: str) -> None:
        if (kind, detail) not in told:
            told.add((kind, detail))
            problem(kind, detail)

    return tell
