"""The features of some of a rank's rows: what may be wrong with them, and how they are cut into shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jest_server.domain.errors import InvalidField
from jest_server.domain.shards import Shard
from jest_server.selector.intake.request import OfRank
from jest_server.stores import blobs
from jest_wire import tracing
from jest_wire.tensors import as_numpy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jest_proto.v1 import tensors_pb2
    from jest_server.domain.references import ReferenceInfo
    from jest_wire.tensors import Bytes


@dataclass(frozen=True)
class Upload(OfRank):
    """The features of some of a rank's rows, complete and checked against their checksums."""

    positions: tuple[int, ...]
    specs: Sequence[tensors_pb2.TensorSpec]
    buffers: Sequence[Bytes]


def check_upload(upload: Upload, rows: int, reference: ReferenceInfo) -> None:
    """Refuses what the reference model cannot embed; ``rows`` is how many the rank submitted.

    Raises:
        InvalidField: If positions, names, datatypes or shapes are not what it needs.
    """
    positions = np.asarray(upload.positions, np.int64)
    if not positions.size or positions[-1] >= rows or (np.diff(positions) <= 0).any():
        raise InvalidField(
            f"positions {_shorten(upload.positions)} are not right: "
            f"expected one or more, ascending, without repeats, below {rows}",
            upload.context(),
            field_name="positions",
        )
    inputs = {i.name: i for i in reference.inputs}
    names = [spec.name for spec in upload.specs]
    if sorted(names) != sorted(inputs):
        raise InvalidField(
            f"tensors are {sorted(names)}, expected {sorted(inputs)}: the inputs of {reference.name!r}",
            upload.context(),
            field_name="tensors",
        )
    for spec in upload.specs:
        expected = inputs[spec.name]
        if spec.datatype != expected.datatype:
            raise InvalidField(
                f"tensors[{spec.name}].datatype is {spec.datatype}, expected {expected.datatype}",
                upload.context(),
                field_name=f"tensors[{spec.name}].datatype",
            )
        wanted = (len(upload.positions), *expected.shape)
        if len(spec.shape) != len(wanted) or any(w not in (-1, s) for w, s in zip(wanted, spec.shape, strict=True)):
            raise InvalidField(
                f"tensors[{spec.name}].shape is {list(spec.shape)}, expected {list(wanted)}",
                upload.context(),
                field_name=f"tensors[{spec.name}].shape",
            )


def shards_of_upload(
    upload: Upload, keys: Sequence[str], reference: ReferenceInfo, digest: str, *, shard_examples: int
) -> list[Shard]:
    """Returns shards of the upload of this digest; ``keys`` are those of all the rank's rows."""
    arrays = {spec.name: (spec, as_numpy(spec, data)) for spec, data in zip(upload.specs, upload.buffers, strict=True)}
    return [
        Shard(
            shard_id=f"{upload.rank}-{digest[:16]}-{start // shard_examples:06d}",
            job=upload.job,
            super_batch_id=upload.super_batch_id,
            reference_model=reference.name,
            reference_version=reference.version,
            keys=tuple(keys[p] for p in upload.positions[start : start + shard_examples]),
            features=_pack({n: (s.datatype, a[start : start + shard_examples]) for n, (s, a) in arrays.items()}),
            traceparent=tracing.traceparent(),
        )
        for start in range(0, len(upload.positions), shard_examples)
    ]


def _pack(arrays: dict[str, tuple[str, Any]]) -> bytes:
    description = {
        "tensors": [{"name": n, "datatype": datatype, "shape": a.shape} for n, (datatype, a) in arrays.items()]
    }
    return blobs.pack(
        description, *(np.ascontiguousarray(a).view(np.uint8).reshape(-1).data for _, a in arrays.values())
    )


def _shorten(positions: Sequence[int]) -> str:
    return str(list(positions)) if len(positions) <= 8 else f"[{', '.join(map(str, positions[:8]))}, …]"
