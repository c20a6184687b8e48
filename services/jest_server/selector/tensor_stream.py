"""Receives the tensors that a call's header announces, and reports what is wrong with them as the call's errors."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jest_server.domain.errors import ChecksumMismatch, InvalidField, TooLarge
from jest_wire.tensors import TensorChecksumError, TensorError, TensorStream, TensorTooLargeError, check_specs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from jest_proto.v1 import tensors_pb2
    from jest_wire.tensors import Bytes


def announced_bytes(specs: Sequence[tensors_pb2.TensorSpec], *, max_bytes: int) -> int:
    """Return how many bytes the call will send.

    Raises:
        InvalidField, TooLarge: If the announcement is wrong.
    """
    with as_request_errors():
        check_specs(specs, max_bytes=max_bytes)
    return sum(spec.byte_length for spec in specs)


async def receive_tensors(
    specs: Sequence[tensors_pb2.TensorSpec], messages: AsyncIterator[Any], *, max_bytes: int
) -> list[Bytes]:
    """Receive the announced tensors; wrong sizes are refused before anything is allocated for them.

    Raises:
        InvalidField, TooLarge: If the announcement or the order of the chunks is wrong.
        ChecksumMismatch: If bytes changed on the way.
    """
    return [data async for data in each_tensor(open_stream(specs, max_bytes=max_bytes), messages)]


def open_stream(specs: Sequence[tensors_pb2.TensorSpec], *, max_bytes: int) -> TensorStream:
    """Return the stream that the announced tensors will be read from.

    Raises:
        InvalidField, TooLarge: If the announcement is wrong.
    """
    with as_request_errors():
        return TensorStream(specs, max_bytes=max_bytes)


async def each_tensor(stream: TensorStream, messages: AsyncIterator[Any]) -> AsyncIterator[Bytes]:
    """Yield each announced tensor as it completes, holding one at a time.

    Raises:
        InvalidField: If the order of the chunks is wrong.
        ChecksumMismatch: If bytes changed on the way.
    """
    async for message in messages:
        with as_request_errors():
            complete = stream.add(_chunk(message))
        for data in complete:
            yield data
    with as_request_errors():
        complete = stream.finish()
    for data in complete:
        yield data


@contextmanager
def as_request_errors() -> Iterator[None]:
    """Turn the codec's errors into the caller's."""
    try:
        yield
    except TensorChecksumError as error:
        raise ChecksumMismatch(str(error), retry_after_s=0.0) from error
    except TensorTooLargeError as error:
        raise TooLarge(str(error), field_name=error.field) from error
    except TensorError as error:
        raise InvalidField(str(error), field_name=error.field) from error


def _chunk(message: Any) -> tensors_pb2.TensorChunk:
    if message.WhichOneof("message") != "chunk":
        raise TensorError("message", "is a second header, expected a chunk")
    chunk: tensors_pb2.TensorChunk = message.chunk
    return chunk
