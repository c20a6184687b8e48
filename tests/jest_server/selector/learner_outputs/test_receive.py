import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from jest_proto.v1 import selection_pb2 as pb
from jest_server.domain.errors import InvalidField, QueueFull, TooLarge
from jest_server.domain.super_batches import SuperBatchRef
from jest_server.runtime.settings import SelectorSettings
from jest_server.selector.learner_outputs import receive
from jest_server.selector.learner_outputs.pending_selections import LossesOfModels, PendingSelections
from jest_server.selector.learner_outputs.receive import LearnerReceiver
from jest_server.selector.learner_outputs.request import SelectRequest
from jest_server.selector.learner_outputs.spilled_matrix import SpilledMatrix
from jest_wire import tensors

MIB = 1 << 20
REF = SuperBatchRef("j", "sb")


class Submitted:
    """Stands in for SubmittedRows: how many rows each rank submitted."""

    def __init__(self, rows):
        self.rows = rows

    async def of_rank(self, caller):
        return self.rows[caller.rank]

    async def of_all_ranks(self, request):  # noqa: ARG002 - the signature is SubmittedRows'
        return self.rows


class Server:
    """A receiver with what it stands on."""

    def __init__(self, rows, scratch_dir, **settings):
        self.selections = PendingSelections(
            max_held_bytes=settings.pop("max_held_bytes", 1 << 40), scratch_dir=scratch_dir
        )
        self.scratch_dir = scratch_dir
        self.world_size = len(rows)
        self._receiver = LearnerReceiver(Submitted(rows), self.selections, SelectorSettings(**settings))

    async def receive(self, arrays, *, rank=0, cut=None, hang=False, **outputs):
        specs, buffers = tensors.encode(arrays)
        header = pb.SelectSubBatchHeader(rank=rank, tensors=specs, **outputs)
        request = SelectRequest(REF, rank, self.world_size, header, time.monotonic() + 10.0)
        messages = stream([pb.SelectSubBatchRequest(chunk=c) for c in tensors.chunks(buffers)][:cut], hang=hang)
        received = await self._receiver.receive(request, messages)
        self.join(rank, received)
        return received

    async def receive_rows(self, losses, *, rank=0, tile_rows=64, **options):
        """Receives a rank's pair losses in tiles of whole rows."""
        starts = range(0, len(losses), tile_rows)
        places = pb.LearnerPairLosses(tiles=[pb.PairLossTile(row=row) for row in starts])
        arrays = {str(row): losses[row : row + tile_rows] for row in starts}
        return await self.receive(arrays, rank=rank, pair_losses=places, **options)

    def join(self, rank, received):
        self.selections.join(REF, self.world_size, lambda _: None).add(rank, received)

    def nothing_is_left(self):
        mapped = Path("/proc/self/maps").read_text()
        return self.selections.held_bytes == 0 and str(self.scratch_dir) not in mapped


async def stream(messages, *, hang):
    for message in messages:
        yield message
    if hang:
        await asyncio.Event().wait()


def losses(rows, columns, seed=0):
    return np.random.default_rng(seed).random((rows, columns), np.float32)


EXAMPLE = {"example_losses": pb.LearnerExampleLosses()}


@pytest.mark.parametrize("rows", [8, MIB])
async def test_losses_arrive_alike_whether_they_are_looked_at_here_or_in_a_thread(tmp_path, rows):
    server = Server([rows], tmp_path)
    sent = losses(rows, 1)[:, 0]
    received = await server.receive({"learner_loss": sent}, **EXAMPLE)
    assert isinstance(received.outputs, LossesOfModels)
    assert received.outputs.reference is None
    np.testing.assert_array_equal(received.outputs.learner.values.numpy(), sent)


async def test_large_tensors_are_looked_at_in_a_thread(tmp_path, monkeypatch):
    moved = []
    to_thread = asyncio.to_thread

    async def noticed(work, *args):
        moved.append(work)
        return await to_thread(work, *args)

    monkeypatch.setattr(receive.asyncio, "to_thread", noticed)
    await Server([8], tmp_path).receive({"learner_loss": losses(8, 1)[:, 0]}, **EXAMPLE)
    assert not moved
    await Server([MIB], tmp_path).receive({"learner_loss": losses(MIB, 1)[:, 0]}, **EXAMPLE)
    assert moved


async def test_ranks_rows_come_to_lie_one_below_the_other(tmp_path):
    server = Server([100, 60], tmp_path)
    whole = losses(160, 160)
    second = await server.receive_rows(whole[100:], rank=1)
    first = await server.receive_rows(whole[:100], rank=0)
    assert isinstance(first.outputs, SpilledMatrix)
    assert first.outputs is second.outputs
    np.testing.assert_array_equal(first.outputs.values.numpy(), whole)
    assert server.selections.held_bytes == whole.nbytes
    server.selections.drop(server.selections.find(REF))
    del first, second
    assert server.nothing_is_left()


async def test_a_repeated_call_finds_its_rows_there_and_reads_nothing(tmp_path):
    server = Server([64, 64], tmp_path)
    part = losses(64, 128)
    first = await server.receive_rows(part)
    assert await server.receive_rows(part, cut=0) is first
    server.selections.drop(server.selections.find(REF))
    del first
    assert server.nothing_is_left()


async def test_other_rows_than_those_that_are_there_do_not_touch_them(tmp_path):
    """A selection may be reading them."""
    server = Server([64, 64], tmp_path)
    first = await server.receive_rows(losses(64, 128))
    again = await server.receive_rows(losses(64, 128, seed=1))
    assert again.digest == first.digest
    np.testing.assert_array_equal(first.outputs.values[:64].numpy(), losses(64, 128))


@pytest.mark.parametrize(
    ("spoil", "options"), [(lambda part: part, {"cut": 1}), (lambda part: np.where(part > 0.99, np.nan, part), {})]
)
async def test_a_spilled_matrix_goes_with_the_only_call_that_failed(tmp_path, spoil, options):
    server = Server([512], tmp_path)
    with pytest.raises(InvalidField) as caught:
        await server.receive_rows(spoil(losses(512, 512)).astype(np.float32), **options)
    assert server.nothing_is_left(), "though the error is still there"
    assert caught.value.field_name.startswith("tensors[")


async def test_a_spilled_matrix_goes_with_the_only_call_that_was_cancelled(tmp_path):
    server = Server([512], tmp_path)
    call = asyncio.create_task(server.receive_rows(losses(512, 512), cut=2, hang=True))
    async with asyncio.timeout(30):
        while not server.selections.held_bytes:
            await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert server.nothing_is_left()


async def test_rows_of_other_ranks_survive_a_call_that_failed(tmp_path):
    server = Server([64, 64], tmp_path)
    first = await server.receive_rows(losses(64, 128))
    with pytest.raises(InvalidField, match="NaN or Inf in row 0, column 0"):
        await server.receive_rows(np.full((64, 128), np.nan, np.float32), rank=1)
    second = await server.receive_rows(losses(64, 128, seed=1), rank=1)
    assert second.outputs is first.outputs
    np.testing.assert_array_equal(first.outputs.values[:64].numpy(), losses(64, 128))


async def test_two_calls_of_one_rank_write_one_after_the_other(tmp_path):
    server = Server([64, 64], tmp_path)
    part = losses(64, 128)
    hanging = asyncio.create_task(server.receive_rows(losses(64, 128, seed=1), cut=0, hang=True))
    async with asyncio.timeout(30):
        while not server.selections.held_bytes:
            await asyncio.sleep(0)
        waiting = asyncio.create_task(server.receive_rows(part))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not waiting.done()
        hanging.cancel()
        received = await waiting
    np.testing.assert_array_equal(received.outputs.values[:64].numpy(), part)


async def test_a_matrix_over_the_limit_is_refused_before_it_is_made(tmp_path):
    server = Server([512], tmp_path, max_pair_loss_bytes=MIB - 1)
    with pytest.raises(TooLarge, match="limit is 1048575"):
        await server.receive_rows(losses(512, 512))
    assert server.nothing_is_left()


async def test_a_matrix_that_finds_no_room_beside_others_is_told_to_come_back(tmp_path):
    server = Server([512], tmp_path, max_held_bytes=MIB)
    with server.selections.receiving(1, {}), pytest.raises(QueueFull, match="would exceed the limit"):
        await server.receive_rows(losses(512, 512))
    assert server.nothing_is_left()
