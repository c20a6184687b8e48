"""What a rank announces of its learner: held against the job's policy before a byte is received."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jest_server.domain.errors import InvalidField
from jest_server.domain.policies import policy_of
from jest_wire.learner_outputs import EMBEDDINGS, OUTPUT_KINDS, Tile, example_loss_names
from jest_wire.tensors import content_digest

if TYPE_CHECKING:
    from jest_proto.v1 import selection_pb2, tensors_pb2
    from jest_server.domain.policies import PolicySpec

LEARNER_DATATYPES = ("FP32", "FP16", "BF16")
MAX_TILE_BYTES = 16 << 20


def check_header(header: selection_pb2.SelectSubBatchHeader, policy: PolicySpec) -> None:
    """Refuses outputs that are not of the kind, shapes and datatypes that the job's policy asks for.

    Raises:
        InvalidField: For the first field that cannot be.
    """
    kind, expected = header.WhichOneof("outputs"), OUTPUT_KINDS[policy.loss]
    if kind != expected:
        found = "is not set" if kind is None else f"is {kind}"
        raise InvalidField(
            f"outputs {found}, expected {expected}: the job's loss is {policy.loss!r}", field_name="outputs"
        )
    for spec in header.tensors:
        if spec.datatype not in LEARNER_DATATYPES:
            raise InvalidField(
                f"tensors[{spec.name}].datatype is {spec.datatype!r}, expected one of {', '.join(LEARNER_DATATYPES)}",
                field_name=f"tensors[{spec.name}].datatype",
            )
    if kind == "embeddings":
        _check_embeddings(header)
    elif kind == "pair_losses":
        _check_tiles(header)
    else:
        _check_names(header, example_loss_names(policy_of(policy)))
        for spec in header.tensors:
            _check_shape(spec, 1, "[rows]")


def check_rows(header: selection_pb2.SelectSubBatchHeader, rows: int, context: dict[str, str]) -> None:
    """Refuses tensors whose first dimension is not the number of rows that the rank submitted.

    Raises:
        InvalidField: For the first such tensor.
    """
    for spec in header.tensors:
        if spec.shape[0] != rows:
            field = f"tensors[{spec.name}].shape"
            expected = ", ".join((str(rows), *("D" for _ in spec.shape[1:])))
            raise InvalidField(
                f"{field} is {list(spec.shape)}, expected [{expected}]: so many rows were submitted",
                context,
                field_name=field,
            )


def digest_of(header: selection_pb2.SelectSubBatchHeader) -> str:
    """Names the content of what is announced; equal for a retry."""
    kind = header.WhichOneof("outputs")
    if kind == "embeddings":
        return content_digest(header.tensors, header.embeddings.scale, header.embeddings.bias)
    places = [(tile.row, tile.column) for tile in header.pair_losses.tiles]
    return content_digest(header.tensors, kind, places)


def tiles_of(header: selection_pb2.SelectSubBatchHeader) -> list[Tile]:
    """Returns where each tensor of pair losses lies in the rank's matrix."""
    pairs = zip(header.pair_losses.tiles, header.tensors, strict=True)
    return [Tile(place.row, place.column, spec.shape[0], spec.shape[1]) for place, spec in pairs]


def _check_embeddings(header: selection_pb2.SelectSubBatchHeader) -> None:
    for name in ("scale", "bias"):
        value = getattr(header.embeddings, name)
        if not math.isfinite(value) or (name == "scale" and value <= 0):
            expected = "a finite number larger than 0" if name == "scale" else "a finite number"
            raise InvalidField(f"embeddings.{name} is {value}, expected {expected}", field_name=f"embeddings.{name}")
    _check_names(header, list(EMBEDDINGS))
    for spec in header.tensors:
        _check_shape(spec, 2, "[rows, D]")
    specs = {spec.name: spec for spec in header.tensors}
    image, text = (specs[name] for name in EMBEDDINGS)
    if (list(image.shape), image.datatype) != (list(text.shape), text.datatype):
        raise InvalidField(
            f"tensors[text_embedding] is {text.datatype} {list(text.shape)}, "
            f"expected the same as image_embedding: {image.datatype} {list(image.shape)}",
            field_name="tensors[text_embedding]",
        )


def _check_tiles(header: selection_pb2.SelectSubBatchHeader) -> None:
    tiles, tensors = header.pair_losses.tiles, header.tensors
    if not tensors or len(tiles) != len(tensors):
        raise InvalidField(
            f"pair_losses.tiles holds {len(tiles)} tiles for {len(tensors)} tensors, expected one for each, "
            "and at least one",
            field_name="pair_losses.tiles",
        )
    for spec in tensors:
        _check_shape(spec, 2, "[rows, columns]")
        if spec.datatype != tensors[0].datatype:
            raise InvalidField(
                f"tensors[{spec.name}].datatype is {spec.datatype}, expected the first tile's {tensors[0].datatype}",
                field_name=f"tensors[{spec.name}].datatype",
            )
        if spec.byte_length > MAX_TILE_BYTES:
            raise InvalidField(
                f"tensors[{spec.name}].byte_length is {spec.byte_length}, the limit for a tile is {MAX_TILE_BYTES}",
                field_name=f"tensors[{spec.name}].byte_length",
            )


def _check_names(header: selection_pb2.SelectSubBatchHeader, expected: list[str]) -> None:
    names = [spec.name for spec in header.tensors]
    if sorted(names) != sorted(expected):
        raise InvalidField(f"tensors are {names}, expected {expected}", field_name="tensors")


def _check_shape(spec: tensors_pb2.TensorSpec, dimensions: int, expected: str) -> None:
    if len(spec.shape) != dimensions or min(spec.shape) < 1:
        raise InvalidField(
            f"tensors[{spec.name}].shape is {list(spec.shape)}, expected {expected}",
            field_name=f"tensors[{spec.name}].shape",
        )
