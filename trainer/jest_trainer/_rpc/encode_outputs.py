"""Encodes a learner's outputs: a header that announces every tensor with its checksum, then chunks of bytes.

Pair losses are cut into tiles of at most one chunk. The matrix is read twice, once for the checksums and once for the
bytes, and only one tile of it is copied at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from jest_proto.v1 import selection_pb2 as pb
from jest_proto.v1 import tensors_pb2
from jest_trainer.outputs import ExampleLosses, PairLosses
from jest_wire.learner_outputs import (
    IMAGE_EMBEDDING,
    LEARNER_LOSS,
    REFERENCE_LOSS,
    TEXT_EMBEDDING,
    Tile,
    example_loss_names,
    tiles,
)
from jest_wire.tensors import chunks, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from jest_core import Embeddings, SelectionPolicy
    from jest_trainer.outputs import LearnerOutputs

WireDtype = Literal["as_is", "fp16", "bf16"]
_DTYPES: dict[WireDtype, torch.dtype | None] = {"as_is": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class EncodedOutputs:
    """The outputs' part of a header, and the chunks that follow it: made anew for every attempt."""

    header: pb.SelectSubBatchHeader
    chunks: Callable[[], Iterator[tensors_pb2.TensorChunk]]


def encode_outputs(outputs: LearnerOutputs, policy: SelectionPolicy, wire_dtype: WireDtype = "as_is") -> EncodedOutputs:
    """Encode outputs that have passed `check_outputs`.

    Raises:
        ValueError: a value is NaN or Inf, or too large for the wire type.
    """
    if isinstance(outputs, PairLosses):
        return _encode_tiles(outputs, wire_dtype)
    if isinstance(outputs, ExampleLosses):
        return _encode_example_losses(outputs, policy, wire_dtype)
    return _encode_embeddings(outputs, wire_dtype)


def _encode_tiles(losses: PairLosses, wire_dtype: WireDtype) -> EncodedOutputs:
    values = losses.values.detach()
    dtype = _on_wire(values.dtype, wire_dtype)
    rows, columns = values.shape
    cut = list(tiles(rows, columns, dtype.itemsize))
    header = pb.SelectSubBatchHeader(pair_losses=pb.LearnerPairLosses())
    for number, tile in enumerate(cut):
        part = _cut(values, tile, dtype)
        _require_finite(part, tile)
        specs, _ = encode({str(number): part})
        header.tensors.extend(specs)
        header.pair_losses.tiles.add(row=tile.row, column=tile.column)

    def tile_chunks() -> Iterator[tensors_pb2.TensorChunk]:
        for number, tile in enumerate(cut):
            _, (data,) = encode({"": _cut(values, tile, dtype)})
            yield tensors_pb2.TensorChunk(tensor_index=number, data=data.tobytes())

    return EncodedOutputs(header, tile_chunks)


def _encode_example_losses(losses: ExampleLosses, policy: SelectionPolicy, wire_dtype: WireDtype) -> EncodedOutputs:
    given = {LEARNER_LOSS: losses.learner, REFERENCE_LOSS: losses.reference}
    sent: dict[str, Tensor] = {}
    for name in example_loss_names(policy):
        values = given[name]
        assert values is not None, "check_outputs requires the losses that the scoring needs"
        sent[name] = values.to(_on_wire(values.dtype, wire_dtype))
    ExampleLosses(sent.get(LEARNER_LOSS), sent.get(REFERENCE_LOSS))  # rounding may have made Inf of a large loss
    return _encode_whole(sent, pb.SelectSubBatchHeader(example_losses=pb.LearnerExampleLosses()))


def _encode_embeddings(embeddings: Embeddings, wire_dtype: WireDtype) -> EncodedOutputs:
    dtype = _on_wire(embeddings.image.dtype, wire_dtype)
    if dtype != embeddings.image.dtype:
        embeddings = replace(embeddings, image=embeddings.image.to(dtype), text=embeddings.text.to(dtype))
    header = pb.SelectSubBatchHeader(embeddings=pb.LearnerEmbeddings(scale=embeddings.scale, bias=embeddings.bias))
    return _encode_whole({IMAGE_EMBEDDING: embeddings.image, TEXT_EMBEDDING: embeddings.text}, header)


def _encode_whole(tensors: dict[str, Tensor], header: pb.SelectSubBatchHeader) -> EncodedOutputs:
    specs, buffers = encode(tensors)
    header.tensors.extend(specs)
    return EncodedOutputs(header, lambda: chunks(buffers))


def _on_wire(dtype: torch.dtype, wire_dtype: WireDtype) -> torch.dtype:
    return _DTYPES[wire_dtype] or (torch.float32 if dtype == torch.float64 else dtype)


def _cut(values: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    part = values[tile.row : tile.row + tile.rows, tile.column : tile.column + tile.columns]
    return part.to("cpu", dtype)


def _require_finite(part: Tensor, tile: Tile) -> None:
    lowest, highest = torch.aminmax(part)
    if bool(lowest.isfinite() & highest.isfinite()):
        return
    row, column = part.isfinite().logical_not().nonzero()[0].tolist()
    raise ValueError(
        f"pair losses must be finite in the wire type {part.dtype}: row {tile.row + row}, "
        f"column {tile.column + column} holds NaN or Inf"
    )
