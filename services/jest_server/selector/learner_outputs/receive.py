"""From a stream of chunks to what a learner says: checked, and in memory or in its scratch file.

The event loop only ever copies a chunk; what looks at whole tensors runs in threads, so that other calls are answered
meanwhile.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from jest_core import Embeddings, ExampleLosses
from jest_server.domain.errors import ChecksumMismatch, InvalidField, TooLarge
from jest_server.selector.learner_outputs.header import check_rows, tiles_of
from jest_server.selector.learner_outputs.pending import LearnerOutputs, LossesOfModels
from jest_server.selector.learner_outputs.spilled_matrix import matrix_bytes, to_the_end
from jest_server.selector.learner_outputs.tiles import TilingError, check_tiling
from jest_wire.learner_outputs import EMBEDDINGS, LEARNER_LOSS, REFERENCE_LOSS
from jest_wire.tensors import (
    TensorChecksumError,
    TensorError,
    TensorStream,
    TensorTooLargeError,
    as_torch,
    check_specs,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from jest_proto.v1 import selection_pb2, tensors_pb2
    from jest_server.runtime.settings import SelectorSettings
    from jest_server.selector.decide.select import Call, Selections
    from jest_server.selector.learner_outputs.pending import Assemblies, RankOutputs
    from jest_server.selector.learner_outputs.spilled_matrix import ScratchMatrix
    from jest_wire.tensors import Bytes

    T = TypeVar("T")

THREAD_FROM_BYTES = 1 << 20
"""Looking at fewer bytes takes less time than handing them to a thread."""


class LearnerReceiver:
    """Receives one rank's learner outputs, after everything about them that can be checked beforehand."""

    def __init__(self, selections: Selections, assemblies: Assemblies, settings: SelectorSettings) -> None:
        self._selections = selections
        self._assemblies = assemblies
        self._settings = settings

    async def receive(
        self,
        header: selection_pb2.SelectSubBatchHeader,
        call: Call,
        digest: str,
        messages: AsyncIterator[Any],
        *,
        deadline_s: float,
    ) -> LearnerOutputs:
        """Receives what ``header`` announces; ``check_header`` was content with it.

        Raises:
            InvalidField: If rows, sizes or values are not what they have to be.
            SuperBatchUnknown, DeadLettered, QueueFull, Conflict, WaitTimeout, ChecksumMismatch: As their names say.
        """
        if header.WhichOneof("outputs") == "pair_losses":
            return await self._receive_pair_losses(header, call, digest, messages, deadline_s)
        rows = await self._selections.rows_of(call)
        check_rows(header, rows, call.context())
        nbytes = sum(spec.byte_length for spec in header.tensors)
        with self._assemblies.receiving(nbytes, call.context()):
            buffers = await receive_tensors(header.tensors, messages, max_bytes=self._settings.max_tensor_bytes)
            try:
                outputs = await off_loop(nbytes, lambda: _outputs(header, buffers))
            except ValueError as error:
                field = str(header.WhichOneof("outputs"))
                raise InvalidField(f"{field}: {error}", call.context(), field_name=field) from error
            return LearnerOutputs(outputs, digest)

    async def _receive_pair_losses(
        self,
        header: selection_pb2.SelectSubBatchHeader,
        call: Call,
        digest: str,
        messages: AsyncIterator[Any],
        deadline_s: float,
    ) -> LearnerOutputs:
        limit = self._settings.max_pair_loss_bytes
        stream = _stream_of(header.tensors, max_bytes=limit)
        rows = await self._selections.rows_of_all(call, deadline_s=deadline_s)
        size, datatype = sum(rows), header.tensors[0].datatype
        nbytes = matrix_bytes(size, datatype)
        if nbytes > limit:
            raise TooLarge(
                f"the pair losses of {size} rows in {datatype} are {nbytes} bytes together, the limit is {limit}",
                call.context(),
                field_name="pair_losses",
            )
        await asyncio.to_thread(_check_tiles, header, rows[call.rank], size, call)
        matrix = await self._assemblies.hold_matrix(call.job, call.super_batch_id, size, datatype)
        held = None
        try:
            # Two calls of one rank must not write its rows at once: one could be wrong, and the other's rows be used.
            async with matrix.receiving[call.rank]:
                assembly = self._assemblies.find(call.job, call.super_batch_id)
                held = assembly.held(call.rank, digest) if assembly else None
                if held is None:
                    await _fill(matrix, header, sum(rows[: call.rank]), _tensors(stream, messages), call)
        except BaseException:
            self._assemblies.let_go_of_matrix(call.job, call.super_batch_id, matrix)
            raise
        if held is not None:  # the assembly has its own hold of the matrix
            self._assemblies.let_go_of_matrix(call.job, call.super_batch_id, matrix)
        return held or LearnerOutputs(matrix, digest)


def announced_bytes(specs: Sequence[tensors_pb2.TensorSpec], *, max_bytes: int) -> int:
    """Returns how many bytes are going to come.

    Raises:
        InvalidField, TooLarge: If the announcement is wrong.
    """
    with _telling():
        check_specs(specs, max_bytes=max_bytes)
    return sum(spec.byte_length for spec in specs)


async def receive_tensors(
    specs: Sequence[tensors_pb2.TensorSpec], messages: AsyncIterator[Any], *, max_bytes: int
) -> list[Bytes]:
    """Receives the announced tensors, refusing wrong sizes before anything is allocated for them.

    Raises:
        InvalidField, TooLarge: If the announcement or the order of the chunks is wrong.
        ChecksumMismatch: If bytes changed on the way.
    """
    return [data async for data in _tensors(_stream_of(specs, max_bytes=max_bytes), messages)]


async def off_loop(nbytes: int, work: Callable[[], T]) -> T:
    """Does work that looks at so many bytes, in a thread if they are many."""
    return work() if nbytes < THREAD_FROM_BYTES else await asyncio.to_thread(work)


async def _fill(
    matrix: ScratchMatrix,
    header: selection_pb2.SelectSubBatchHeader,
    first_row: int,
    received: AsyncIterator[Bytes],
    call: Call,
) -> None:
    """Writes a rank's tiles into the matrix of all ranks, each as it is complete."""
    tiles = iter(zip(tiles_of(header), header.tensors, strict=True))
    async for data in received:
        tile, spec = next(tiles)
        place = tile._replace(row=first_row + tile.row)
        # Always in a thread: writing to a mapped file may wait for the disk.
        wrong = await to_the_end(matrix.write, place, as_torch(spec, data))
        if wrong is not None:
            row, column = wrong
            raise InvalidField(
                f"tensors[{spec.name}] holds NaN or Inf in row {row}, column {column}, expected finite losses",
                call.context(),
                field_name=f"tensors[{spec.name}]",
            )


@contextmanager
def _telling() -> Iterator[None]:
    """StartTimeFairQueue what the codec finds wrong into errors for the caller."""
    try:
        yield
    except TensorChecksumError as error:
        raise ChecksumMismatch(str(error), retry_after_s=0.0) from error
    except TensorTooLargeError as error:
        raise TooLarge(str(error), field_name=error.field) from error
    except TensorError as error:
        raise InvalidField(str(error), field_name=error.field) from error


def _stream_of(specs: Sequence[tensors_pb2.TensorSpec], *, max_bytes: int) -> TensorStream:
    with _telling():
        return TensorStream(specs, max_bytes=max_bytes)


async def _tensors(stream: TensorStream, messages: AsyncIterator[Any]) -> AsyncIterator[Bytes]:
    """Yields the announced tensors as they are complete, holding one at a time."""
    async for message in messages:
        with _telling():
            complete = stream.add(_chunk(message))
        for data in complete:
            yield data
    with _telling():
        complete = stream.finish()
    for data in complete:
        yield data


def _chunk(message: Any) -> tensors_pb2.TensorChunk:
    if message.WhichOneof("message") != "chunk":
        raise TensorError("message", "is a second header, expected a chunk")
    chunk: tensors_pb2.TensorChunk = message.chunk
    return chunk


def _outputs(header: selection_pb2.SelectSubBatchHeader, buffers: Sequence[Bytes]) -> RankOutputs:
    """Gives received bytes their meaning.

    Raises:
        ValueError: If a value is no number.
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


def _check_tiles(header: selection_pb2.SelectSubBatchHeader, rows: int, columns: int, call: Call) -> None:
    try:
        check_tiling(tiles_of(header), rows, columns)
    except TilingError as error:
        field = "pair_losses.tiles" if error.tile is None else f"pair_losses.tiles[{error.tile}]"
        raise InvalidField(f"{field} {error}", call.context(), field_name=field) from error
