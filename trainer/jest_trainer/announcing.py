"""A learner's outputs as they travel: a header that announces every tensor with its checksum, and chunks.

Pair losses are cut into tiles of at most one chunk. The matrix is read twice, once for the checksums and once for the
bytes, and only ever a tile of it is copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from jest_proto.tensors import CHUNK_BYTES, chunks, encode
from jest_proto.v1 import selection_pb2 as pb
from jest_proto.v1 import tensors_pb2
from jest_trainer.needs import models_that_count
from jest_trainer.outputs import ExampleLosses, PairLosses
from jest_trainer.wire import IMAGE, TEXT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from jest_core import Embeddings, SelectionPolicy
    from jest_trainer.outputs import LearnerOutputs

WireDtype = Literal["as_is", "fp16", "bf16"]
_DTYPES: dict[WireDtype, torch.dtype | None] = {"as_is": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Announcement:
    """The part of a header that tells of the outputs, and what follows it: made anew for every attempt."""

    header: pb.SelectSubBatchHeader
    chunks: Callable[[], Iterator[tensors_pb2.TensorChunk]]


def announce(outputs: LearnerOutputs, policy: SelectionPolicy, wire_dtype: WireDtype = "as_is") -> Announcement:
    """Get outputs ready to be sent; `check_outputs` was content with them.

    Raises:
        ValueError: a value is NaN or Inf, or too large for the wire type.
    """
    if isinstance(outputs, PairLosses):
        return _announce_tiles(outputs, wire_dtype)
    if isinstance(outputs, ExampleLosses):
        return _announce_example_losses(outputs, policy, wire_dtype)
    return _announce_embeddings(outputs, wire_dtype)


class Place(NamedTuple):
    """Where a tile lies in its matrix."""

    row: int
    column: int
    rows: int
    columns: int


def tiles(rows: int, columns: int, itemsize: int) -> Iterator[Place]:
    """Cover a matrix with tiles of at most one chunk: as many whole rows as fit, or pieces of one row."""
    elements = CHUNK_BYTES // itemsize
    width = min(columns, elements)
    height = elements // width
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield Place(row, column, min(height, rows - row), min(width, columns - column))


def _announce_tiles(losses: PairLosses, wire_dtype: WireDtype) -> Announcement:
    values = losses.values.detach()
    dtype = _on_wire(values.dtype, wire_dtype)
    rows, columns = values.shape
    places = list(tiles(rows, columns, dtype.itemsize))
    header = pb.SelectSubBatchHeader(pair_losses=pb.LearnerPairLosses())
    for number, place in enumerate(places):
        tile = _cut(values, place, dtype)
        _require_finite(tile, place)
        specs, _ = encode({str(number): tile})
        header.tensors.extend(specs)
        header.pair_losses.tiles.add(row=place.row, column=place.column)

    def tile_chunks() -> Iterator[tensors_pb2.TensorChunk]:
        for number, place in enumerate(places):
            _, (data,) = encode({"": _cut(values, place, dtype)})
            yield tensors_pb2.TensorChunk(tensor_index=number, data=data.tobytes())

    return Announcement(header, tile_chunks)


def _announce_example_losses(losses: ExampleLosses, policy: SelectionPolicy, wire_dtype: WireDtype) -> Announcement:
    counted: dict[str, Tensor] = {model: getattr(losses, model) for model in models_that_count(policy)}
    sent = {model: values.to(_on_wire(values.dtype, wire_dtype)) for model, values in counted.items()}
    ExampleLosses(**sent)  # rounding may have made Inf of a large loss
    header = pb.SelectSubBatchHeader(example_losses=pb.LearnerExampleLosses())
    return _announce_whole({f"{model}_loss": values for model, values in sent.items()}, header)


def _announce_embeddings(embeddings: Embeddings, wire_dtype: WireDtype) -> Announcement:
    dtype = _on_wire(embeddings.image.dtype, wire_dtype)
    if dtype != embeddings.image.dtype:
        embeddings = replace(embeddings, image=embeddings.image.to(dtype), text=embeddings.text.to(dtype))
    header = pb.SelectSubBatchHeader(embeddings=pb.LearnerEmbeddings(scale=embeddings.scale, bias=embeddings.bias))
    return _announce_whole({IMAGE: embeddings.image, TEXT: embeddings.text}, header)


def _announce_whole(tensors: dict[str, Tensor], header: pb.SelectSubBatchHeader) -> Announcement:
    specs, buffers = encode(tensors)
    header.tensors.extend(specs)
    return Announcement(header, lambda: chunks(buffers))


def _on_wire(dtype: torch.dtype, wire_dtype: WireDtype) -> torch.dtype:
    return _DTYPES[wire_dtype] or (torch.float32 if dtype == torch.float64 else dtype)


def _cut(values: Tensor, place: Place, dtype: torch.dtype) -> Tensor:
    tile = values[place.row : place.row + place.rows, place.column : place.column + place.columns]
    return tile.to("cpu", dtype)


def _require_finite(tile: Tensor, place: Place) -> None:
    lowest, highest = torch.aminmax(tile)
    if bool(lowest.isfinite() & highest.isfinite()):
        return
    row, column = tile.isfinite().logical_not().nonzero()[0].tolist()
    raise ValueError(
        f"pair losses must be finite in the wire type {tile.dtype}: row {place.row + row}, "
        f"column {place.column + column} holds NaN or Inf"
    )
