"""From a stream of chunks to a rank's learner outputs: checked, and in memory or in a spilled matrix.

The event loop only ever copies a chunk; what looks at whole tensors runs in threads, so that other calls are answered
meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from jest_core import Embeddings, ExampleLosses
from jest_server.domain.errors import InvalidField, TooLarge
from jest_server.selector.learner_outputs.header import check_rows, tiles_of
from jest_server.selector.learner_outputs.pending_selections import LearnerOutputs, LossesOfModels
from jest_server.selector.learner_outputs.spilled_matrix import matrix_bytes
from jest_server.selector.learner_outputs.tiles import TilingError, check_tiling
from jest_server.selector.tensor_stream import each_tensor, open_stream, receive_tensors
from jest_server.selector.threads import in_thread_if_large, run_uncancelled
from jest_wire.learner_outputs import EMBEDDINGS, LEARNER_LOSS, REFERENCE_LOSS
from jest_wire.tensors import as_torch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from jest_proto.v1 import selection_pb2
    from jest_server.runtime.settings import SelectorSettings
    from jest_server.selector.learner_outputs.pending_selections import PendingSelections, RankOutputs
    from jest_server.selector.learner_outputs.request import SelectRequest
    from jest_server.selector.learner_outputs.spilled_matrix import SpilledMatrix
    from jest_server.selector.learner_outputs.submitted_rows import SubmittedRows
    from jest_wire.tensors import Bytes


class LearnerReceiver:
    """Receives one rank's learner outputs, after everything about them that can be checked beforehand."""

    def __init__(self, rows: SubmittedRows, selections: PendingSelections, settings: SelectorSettings) -> None:
        self._rows = rows
        self._selections = selections
        self._settings = settings

    async def receive(self, request: SelectRequest, messages: AsyncIterator[Any]) -> LearnerOutputs:
        """Receive what the request's header announces; `check_header` has accepted it.

        Raises:
            InvalidField: If rows, sizes or values are wrong.
            SuperBatchUnknown, DeadLettered: If the super-batch is not in flight.
            QueueFull: If there is no room for them now.
            Conflict: If the rank sent others before, or other ranks' pair losses are of another datatype.
            WaitTimeout: If the other ranks, on whom the size of pair losses depends, did not submit in time.
            ChecksumMismatch: If bytes changed on the way.
        """
        header = request.header
        if header.WhichOneof("outputs") == "pair_losses":
            return await self._receive_pair_losses(request, messages)
        check_rows(header, await self._rows.of_rank(request), request.metadata)
        nbytes = sum(spec.byte_length for spec in header.tensors)
        with self._selections.receiving(nbytes, request.metadata):
            buffers = await receive_tensors(header.tensors, messages, max_bytes=self._settings.max_tensor_bytes)
            try:
                outputs = await in_thread_if_large(nbytes, lambda: _outputs(header, buffers))
            except ValueError as error:
                field = str(header.WhichOneof("outputs"))
                raise InvalidField(f"{field}: {error}", request.metadata, field_name=field) from error
            return LearnerOutputs(outputs, request.digest)

    async def _receive_pair_losses(self, request: SelectRequest, messages: AsyncIterator[Any]) -> LearnerOutputs:
        header, limit = request.header, self._settings.max_pair_loss_bytes
        stream = open_stream(header.tensors, max_bytes=limit)
        rows = await self._rows.of_all_ranks(request)
        size, datatype = sum(rows), header.tensors[0].datatype
        nbytes = matrix_bytes(size, datatype)
        if nbytes > limit:
            raise TooLarge(
                f"the pair losses of {size} rows in {datatype} are {nbytes} bytes together, the limit is {limit}",
                request.metadata,
                field_name="pair_losses",
            )
        await asyncio.to_thread(_check_tiles, request, rows[request.rank], size)
        matrix = await self._selections.acquire_matrix(request.ref, size, datatype)
        held = None
        try:
            # Two calls of one rank must not write its rows at once: one could be wrong, and the other's rows be used.
            async with matrix.receiving[request.rank]:
                pending = self._selections.find(request.ref)
                # What is written may be being read: a rank's pair losses are not replaced.
                held = pending.outputs.get(request.rank) if pending else None
                if held is None:
                    await _fill(matrix, request, sum(rows[: request.rank]), each_tensor(stream, messages))
        except BaseException:
            self._selections.release_matrix(request.ref, matrix)
            raise
        if held is not None:  # the pending selection has its own reference to the matrix
            self._selections.release_matrix(request.ref, matrix)
        return held or LearnerOutputs(matrix, request.digest)


async def _fill(matrix: SpilledMatrix, request: SelectRequest, first_row: int, received: AsyncIterator[Bytes]) -> None:
    """Write a rank's tiles into the matrix of all ranks, each as it completes."""
    tiles = iter(zip(tiles_of(request.header), request.header.tensors, strict=True))
    async for data in received:
        tile, spec = next(tiles)
        place = tile._replace(row=first_row + tile.row)
        # Always in a thread: writing to a mapped file may wait for the disk.
        wrong = await run_uncancelled(matrix.write, place, as_torch(spec, data))
        if wrong is not None:
            row, column = wrong
            raise InvalidField(
                f"tensors[{spec.name}] holds NaN or Inf in row {row}, column {column}, expected finite losses",
                request.metadata,
                field_name=f"tensors[{spec.name}]",
            )


def _outputs(header: selection_pb2.SelectSubBatchHeader, buffers: Sequence[Bytes]) -> RankOutputs:
    """Give received bytes their meaning.

    Raises:
        ValueError: If a value is not finite.
    """
    tensors = {spec.name: as_torch(spec, data) for spec, data in zip(header.tensors, buffers, strict=True)}
    if header.WhichOneof("outputs") == "embeddings":
        image, text = (tensors[name] for name in EMBEDDINGS)
        return Embeddings(image, text, scale=header.embeddings.scale, bias=header.embeddings.bias)
    learner, reference = (_example_losses(name, tensors) for name in (LEARNER_LOSS, REFERENCE_LOSS))
    return LossesOfModels(learner, reference)


def _example_losses(name: str, tensors: dict[str, Any]) -> ExampleLosses | None:
    if name not in tensors:
        return None
    try:
        return ExampleLosses(tensors[name])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_tiles(request: SelectRequest, rows: int, columns: int) -> None:
    try:
        check_tiling(tiles_of(request.header), rows, columns)
    except TilingError as error:
        field = "pair_losses.tiles" if error.tile is None else f"pair_losses.tiles[{error.tile}]"
        raise InvalidField(f"{field} {error}", request.metadata, field_name=field) from error
