"""Where every example's row is, over all files of a model: sorted runs of numbers, 28 bytes for each row.

Every file's digests are spread evenly over all digests, so searching file by file would look into all of them for
every key. Runs are merged as they grow: there are never more than some, and adding files seldom sorts everything again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from jest_server.stores.embedding_files.format import Checksums, Digests, halves

if TYPE_CHECKING:
    from collections.abc import Mapping

Numbers = npt.NDArray[np.uint32]
Alive = npt.NDArray[np.bool_]
"""By file number: False for a file that is gone or was replaced."""


@dataclass(frozen=True)
class Run:
    """Rows, sorted by the first half of their digests."""

    high: npt.NDArray[np.uint64]
    low: npt.NDArray[np.uint64]
    file: Numbers
    row: Numbers
    checksum: Checksums

    def __len__(self) -> int:
        return len(self.high)


@dataclass(frozen=True)
class Found:
    """Where rows are, for each of the digests asked for; ``file`` is -1 where there is none."""

    file: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    checksum: Checksums


@dataclass(frozen=True)
class DigestIndex:
    """Never changed: ``with_files`` makes another, so that threads may search while files are added."""

    runs: tuple[Run, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def with_files(self, files: Mapping[int, tuple[Digests, Checksums]], alive: Alive) -> DigestIndex:
        """Returns the index with the rows of more files, by number; some rows of dead files are dropped on the way."""
        runs = [*self.runs, *(_run_of(number, *index) for number, index in files.items() if len(index[0]))]
        runs.sort(key=len, reverse=True)
        merged: list[Run] = []
        while runs:
            group = [runs.pop()]
            while runs and len(runs[-1]) < 2 * sum(map(len, group)):
                group.append(runs.pop())
            merged.append(_merged(group, alive) if len(group) > 1 else group[0])
        return DigestIndex(tuple(merged))

    def find(self, digests: Digests, alive: Alive) -> Found:
        """Finds one row in a living file for each digest, where there is one."""
        found = Found(
            np.full(len(digests), -1, np.int64), np.zeros(len(digests), np.int64), np.zeros(len(digests), np.uint32)
        )
        high, low = halves(digests)
        for run in self.runs:
            _search(run, high, low, alive, found)
        return found


def _run_of(number: int, digests: Digests, checksums: Checksums) -> Run:
    high, low = halves(digests)
    rows = np.arange(len(digests), dtype=np.uint32)
    return Run(high, low, np.full(len(digests), number, np.uint32), rows, checksums)


def _merged(runs: list[Run], alive: Alive) -> Run:
    high, low, file, row, checksum = (
        np.concatenate([getattr(run, name) for run in runs]) for name in ("high", "low", "file", "row", "checksum")
    )
    order = np.argsort(high, kind="stable")  # a merging sort, made for runs; rows of equal halves may lie in any order
    order = order[alive[file[order]]]
    return Run(high[order], low[order], file[order], row[order], checksum[order])


def _search(run: Run, high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64], alive: Alive, found: Found) -> None:
    """Fills in what the run knows of digests that are not found yet."""
    wanted = np.flatnonzero(found.file < 0)
    at = np.searchsorted(run.high, high[wanted])
    while wanted.size:
        # Equal halves lie side by side: of one digest in several files, or, once in a universe, of two digests.
        near = at < len(run)
        wanted, at = wanted[near], at[near]
        near = run.high[at] == high[wanted]
        wanted, at = wanted[near], at[near]
        right = (run.low[at] == low[wanted]) & alive[run.file[at]]
        found.file[wanted[right]] = run.file[at[right]]
        found.row[wanted[right]] = run.row[at[right]]
        found.checksum[wanted[right]] = run.checksum[at[right]]
        wanted, at = wanted[~right], at[~right] + 1
