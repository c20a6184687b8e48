import asyncio
import errno
import os
import re
from pathlib import Path

import pytest
import torch

from jest_server.domain.errors import Conflict, QueueFull
from jest_server.domain.super_batches import SuperBatchRef
from jest_server.selector.learner_outputs.spilled_matrix import SpilledMatrices, SpilledMatrix
from jest_wire.learner_outputs import Tile

REF, OTHER = SuperBatchRef("j", "sb"), SuperBatchRef("j", "other")


def mapped_files(folder):
    """The spilled matrices of this process under a folder: their files have no name, but the process maps them."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


@pytest.fixture
def opened(tmp_path):
    def make(size, datatype="FP32"):
        matrix = SpilledMatrix(size, datatype)
        matrix.open(tmp_path)
        return matrix

    return make


@pytest.mark.parametrize(("datatype", "dtype"), [("FP32", torch.float32), ("BF16", torch.bfloat16)])
def test_tiles_come_to_lie_where_they_belong(opened, datatype, dtype):
    losses = torch.arange(36, dtype=torch.float32).view(6, 6).to(dtype)
    matrix = opened(6, datatype)
    for row, column in ((0, 0), (0, 2), (3, 0), (3, 2)):
        width = 2 if column == 0 else 4
        assert matrix.write(Tile(row, column, 3, width), losses[row : row + 3, column : column + width]) is None
    assert matrix.values.dtype is dtype
    assert torch.equal(matrix.values, losses)
    assert matrix.nbytes == losses.nbytes


def test_the_file_has_no_name_and_goes_when_it_is_closed(opened, tmp_path):
    matrix = opened(64)
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - the folder's own entries, hidden ones too
    assert mapped_files(tmp_path)
    matrix.close()
    assert not mapped_files(tmp_path)


def test_the_disk_space_comes_back_though_somebody_still_refers_to_the_values(opened):
    matrix = opened(64)
    values = matrix.values
    values.fill_(1.0)
    matrix.close()
    assert not values.any(), "what has been given back reads as zeros"


def test_a_matrix_lies_in_the_file_and_not_in_memory(opened):
    def private_kib():
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1])

    before = private_kib()
    matrix = opened(4096)
    for row in range(0, 4096, 64):
        matrix.write(Tile(row, 0, 64, 4096), torch.ones(64, 4096))
    assert matrix.nbytes == 64 << 20
    assert private_kib() - before < 16 << 10
    matrix.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_told_and_not_written(opened, value):
    matrix = opened(4)
    losses = torch.ones(2, 3)
    losses[1, 2] = value
    assert matrix.write(Tile(0, 0, 2, 3), losses) == (1, 2)
    assert not matrix.values.any()


def no_limit(nbytes, context):
    """There is room for everything."""


async def test_all_ranks_of_a_super_batch_share_one_matrix_until_the_last_releases_it(tmp_path):
    matrices = SpilledMatrices(tmp_path)
    first = await matrices.acquire(REF, 8, "FP16", no_limit)
    assert await matrices.acquire(REF, 8, "FP16", no_limit) is first
    other = await matrices.acquire(OTHER, 8, "FP16", no_limit)
    assert other is not first
    matrices.release(OTHER, other)
    matrices.release(REF, first)
    assert matrices.nbytes == 128
    matrices.release(REF, first)
    assert matrices.nbytes == 0
    assert not mapped_files(tmp_path)


async def test_ranks_that_come_at_once_share_one_matrix(tmp_path):
    matrices = SpilledMatrices(tmp_path)
    held = await asyncio.gather(*(matrices.acquire(REF, 8, "FP16", no_limit) for _ in range(5)))
    assert len(set(map(id, held))) == 1
    assert (held[0].refcount, matrices.nbytes) == (5, 128)


async def test_a_rank_whose_losses_are_of_another_datatype_is_refused(tmp_path):
    matrices = SpilledMatrices(tmp_path)
    held = await matrices.acquire(REF, 8, "FP16", no_limit)
    with pytest.raises(Conflict, match="FP32 of 8 rows, another in FP16 of 8"):
        await matrices.acquire(REF, 8, "FP32", no_limit)
    assert held.refcount == 1


async def test_a_matrix_that_there_is_no_room_for_leaves_nothing(tmp_path):
    def refuse(nbytes, context):
        raise QueueFull(f"no room for {nbytes}", context)

    matrices = SpilledMatrices(tmp_path)
    with pytest.raises(QueueFull, match="no room for 256"):
        await matrices.acquire(REF, 8, "FP32", refuse)
    assert matrices.nbytes == 0


async def test_a_full_disk_is_told_as_such_and_the_process_lives(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(QueueFull, match="scratch file of 256 bytes, and its disk is full") as caught:
        await SpilledMatrices(tmp_path).acquire(REF, 8, "FP32", no_limit)
    assert caught.value.retry_after_s > 0
