"""Pair-loss matrices in scratch files: as large as the disk allows, without a copy in this process's memory.

A file has no name, so that it goes with the process however that ends. Its disk space is given back as soon as no call
and no assembly holds its matrix, also when the error that ended them still refers to it.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import tempfile
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

from jest_server.domain.errors import Conflict, QueueFull
from jest_wire.tensors import DATATYPES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from jest_wire.learner_outputs import Tile

P = ParamSpec("P")
T = TypeVar("T")
SCRATCH_FULL_RETRY_S = 5.0


class ScratchMatrix:
    """``[size, size]`` losses, memory-mapped; to be opened before its first use and closed after the last."""

    def __init__(self, size: int, datatype: str) -> None:
        self.size = size
        self.datatype = datatype
        self.nbytes = matrix_bytes(size, datatype)
        self.receiving: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By rank: held by the call whose rows come in."""
        self.holders = 0
        """Calls that bring rows, and rows that an assembly has."""
        self.values = torch.empty(0, 0)
        self._mapped: mmap.mmap | None = None

    def open(self, folder: Path | None) -> None:
        """Takes the disk space, all of it, so that writing cannot fail.

        Raises:
            OSError: If there is not enough space.
        """
        with tempfile.TemporaryFile(dir=folder) as file:
            _take_space(file.fileno(), self.nbytes)
            self._mapped = mmap.mmap(file.fileno(), self.nbytes)
        dtype = getattr(torch, DATATYPES[self.datatype].torch)
        self.values = torch.frombuffer(self._mapped, dtype=dtype).view(self.size, self.size)

    def close(self) -> None:
        """Gives the disk space back. Who still reads the values finds zeros."""
        if self._mapped is None:
            return
        if hasattr(mmap, "MADV_REMOVE"):
            # Unmapping would do, but references in the tracebacks of failed calls can keep it mapped.
            with suppress(OSError):  # a file system that cannot: the space comes back when it is unmapped
                self._mapped.madvise(mmap.MADV_REMOVE)
        self._mapped = None
        self.values = torch.empty(0, 0)

    def write(self, tile: Tile, losses: torch.Tensor) -> tuple[int, int] | None:
        """Puts a tile's losses in place, unless one is no number: then its row and column in the tile are returned."""
        lowest, highest = torch.aminmax(losses)
        if not bool(lowest.isfinite() & highest.isfinite()):
            row, column = losses.isfinite().logical_not().nonzero()[0].tolist()
            return row, column
        self.values[tile.row : tile.row + tile.rows, tile.column : tile.column + tile.columns].copy_(losses)
        return None


class ScratchMatrices:
    """The pair-loss matrices of super-batches in flight, one each, for as long as anybody holds it."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._by_id: dict[tuple[str, str], ScratchMatrix] = {}
        self._opening = asyncio.Lock()

    @property
    def nbytes(self) -> int:
        """Disk space that they take."""
        return sum(matrix.nbytes for matrix in self._by_id.values())

    async def hold(
        self,
        job: str,
        super_batch_id: str,
        size: int,
        datatype: str,
        require_room: Callable[[int, dict[str, str]], None],
    ) -> ScratchMatrix:
        """Returns the super-batch's matrix, made now unless another rank's call did; to be let go of.

        Args:
            job: With ``super_batch_id``, what the matrix belongs to.
            super_batch_id: See ``job``.
            size: Rows of all ranks.
            datatype: Of its elements.
            require_room: Called with bytes and ids before a matrix is made; it may refuse.

        Raises:
            Conflict: If another rank sends losses of another datatype, or rows of a deleted job still come in.
            QueueFull: If the disk is full, or ``require_room`` refuses.
        """
        key = (job, super_batch_id)
        context = {"job": job, "super_batch_id": super_batch_id}
        async with self._opening:
            matrix = self._by_id.get(key)
            if matrix is None:
                matrix = ScratchMatrix(size, datatype)
                require_room(matrix.nbytes, context)
                self._by_id[key] = matrix
                try:
                    await self._open(matrix, context)
                except BaseException:
                    del self._by_id[key]
                    matrix.close()
                    raise
            elif (matrix.datatype, matrix.size) != (datatype, size):
                raise Conflict(
                    f"the ranks' learners differ: this rank announces pair losses in {datatype} of {size} rows, "
                    f"another in {matrix.datatype} of {matrix.size}",
                    context,
                )
            matrix.holders += 1
        return matrix

    def let_go(self, job: str, super_batch_id: str, matrix: ScratchMatrix) -> None:
        """Takes back one hold of a matrix; the last one closes it."""
        matrix.holders -= 1
        if not matrix.holders:
            del self._by_id[job, super_batch_id]
            matrix.close()

    async def _open(self, matrix: ScratchMatrix, context: dict[str, str]) -> None:
        try:
            await to_the_end(matrix.open, self._folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise QueueFull(
                f"the pair losses need a scratch file of {matrix.nbytes} bytes, and its disk is full",
                context,
                retry_after_s=SCRATCH_FULL_RETRY_S,
            ) from error


def matrix_bytes(size: int, datatype: str) -> int:
    """Bytes of a square matrix of so many rows."""
    return size * size * DATATYPES[datatype].numpy.itemsize


async def to_the_end(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Works in a thread; who is cancelled meanwhile still waits for its end, and leaves nobody at work behind."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    finally:
        await asyncio.wait([task])


def _take_space(file: int, nbytes: int) -> None:
    """Makes the file so large; without space taken, a full disk would end the process when a page is first touched."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
    else:
        os.ftruncate(file, nbytes)
