"""Pair-loss matrices in temporary files: as large as the disk allows, without a copy in this process's memory.

A file has no name, so that it goes with the process however that ends. Its disk space is freed as soon as no call and
no pending selection uses its matrix, even if the error that ended them still refers to it.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import tempfile
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from jest_server.domain.errors import Conflict, QueueFull
from jest_server.selector.threads import run_uncancelled
from jest_wire.tensors import DATATYPES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from jest_server.domain.super_batches import SuperBatchRef
    from jest_wire.learner_outputs import Tile

SCRATCH_FULL_RETRY_S = 5.0


class SpilledMatrix:
    """`[size, size]` losses, memory-mapped; to be opened before its first use and closed after the last."""

    def __init__(self, size: int, datatype: str) -> None:
        self.size = size
        self.datatype = datatype
        self.nbytes = matrix_bytes(size, datatype)
        self.receiving: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By rank: held by the call that is receiving its rows."""
        self.refcount = 0
        """Calls that are receiving rows, and ranks whose rows a pending selection has."""
        self.values = torch.empty(0, 0)
        self._mapped: mmap.mmap | None = None

    def open(self, folder: Path | None) -> None:
        """Allocate all the disk space, so that writing cannot fail.

        Raises:
            OSError: If there is not enough space.
        """
        with tempfile.TemporaryFile(dir=folder) as file:
            _take_space(file.fileno(), self.nbytes)
            self._mapped = mmap.mmap(file.fileno(), self.nbytes)
        dtype = getattr(torch, DATATYPES[self.datatype].torch)
        self.values = torch.frombuffer(self._mapped, dtype=dtype).view(self.size, self.size)

    def close(self) -> None:
        """Free the disk space; a remaining view of the values reads zeros."""
        if self._mapped is None:
            return
        if hasattr(mmap, "MADV_REMOVE"):
            # Unmapping would do, but references in the tracebacks of failed calls can keep it mapped.
            with suppress(OSError):  # a file system that cannot: the space comes back when it is unmapped
                self._mapped.madvise(mmap.MADV_REMOVE)
        self._mapped = None
        self.values = torch.empty(0, 0)

    def write(self, tile: Tile, losses: torch.Tensor) -> tuple[int, int] | None:
        """Write a tile's losses; if one is not finite, write none and return its row and column in the tile."""
        lowest, highest = torch.aminmax(losses)
        if not bool(lowest.isfinite() & highest.isfinite()):
            row, column = losses.isfinite().logical_not().nonzero()[0].tolist()
            return row, column
        self.values[tile.row : tile.row + tile.rows, tile.column : tile.column + tile.columns].copy_(losses)
        return None


class SpilledMatrices:
    """The pair-loss matrices of super-batches in flight, one each, counted by reference."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._by_ref: dict[SuperBatchRef, SpilledMatrix] = {}
        self._opening = asyncio.Lock()

    @property
    def nbytes(self) -> int:
        """Disk space that they use."""
        return sum(matrix.nbytes for matrix in self._by_ref.values())

    async def acquire(
        self, ref: SuperBatchRef, size: int, datatype: str, require_room: Callable[[int, dict[str, str]], None]
    ) -> SpilledMatrix:
        """Return the super-batch's matrix, opened now unless another rank's call did; the caller has to release it.

        Args:
            ref: What the matrix belongs to.
            size: Rows of all ranks.
            datatype: Of its elements.
            require_room: Called with bytes and error metadata before a matrix is opened; it may refuse.

        Raises:
            Conflict: If another rank sends losses of another datatype, or rows of a deleted job still come in.
            QueueFull: If the disk is full, or `require_room` refuses.
        """
        async with self._opening:
            matrix = self._by_ref.get(ref)
            if matrix is None:
                matrix = SpilledMatrix(size, datatype)
                require_room(matrix.nbytes, ref.metadata)
                self._by_ref[ref] = matrix
                try:
                    await self._open(matrix, ref)
                except BaseException:
                    del self._by_ref[ref]
                    matrix.close()
                    raise
            elif (matrix.datatype, matrix.size) != (datatype, size):
                raise Conflict(
                    f"the ranks' learners differ: this rank announces pair losses in {datatype} of {size} rows, "
                    f"another in {matrix.datatype} of {matrix.size}",
                    ref.metadata,
                )
            matrix.refcount += 1
        return matrix

    def release(self, ref: SuperBatchRef, matrix: SpilledMatrix) -> None:
        """Drop one reference to a matrix; the last one closes it."""
        matrix.refcount -= 1
        if not matrix.refcount:
            del self._by_ref[ref]
            matrix.close()

    async def _open(self, matrix: SpilledMatrix, ref: SuperBatchRef) -> None:
        try:
            await run_uncancelled(matrix.open, self._folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise QueueFull(
                f"the pair losses need a scratch file of {matrix.nbytes} bytes, and its disk is full",
                ref.metadata,
                retry_after_s=SCRATCH_FULL_RETRY_S,
            ) from error


def matrix_bytes(size: int, datatype: str) -> int:
    """Return the bytes of a square matrix of `size` rows."""
    return size * size * DATATYPES[datatype].numpy.itemsize


def _take_space(file: int, nbytes: int) -> None:
    """Make the file that large; if space were not allocated, a full disk would kill the process on the first access."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
    else:
        os.ftruncate(file, nbytes)
