"""The use case of scoring one shard: embed what the cache lacks, remember it, hand the result in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jest_proto.tensors import DATATYPES
from jest_server import records
from jest_server.model import ShardResult

if TYPE_CHECKING:
    from jest_server.model import ReferenceInfo, Shard
    from jest_server.ports import EmbeddingCache, ReferenceModel


class UnscorableShard(Exception):
    """No retry can score this shard; ``reason`` is a constant, the message tells the rest."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Scoring:
    """Scores shards for one reference model at one version."""

    cache: EmbeddingCache
    model: ReferenceModel
    reference: ReferenceInfo

    async def score(self, shard: Shard) -> ShardResult:
        """Returns the embeddings of all the shard's keys, rounded as the cache holds them.

        Cached and fresh embeddings are the same bytes, so a selection does not depend on which of the two it got.

        Raises:
            UnscorableShard: If the shard wants another model version, or its features cannot be read.
            ReferenceModelError: If the inference failed.
        """
        wanted = (shard.reference_model, shard.reference_version)
        served = (self.reference.name, self.reference.version)
        if wanted != served:
            raise UnscorableShard(
                "REFERENCE_CHANGED", f"wants reference model {wanted[0]!r} version {wanted[1]!r}, served is {served}"
            )
        first_rows: dict[str, int] = {}
        for row, key in enumerate(shard.keys):
            first_rows.setdefault(key, row)
        keys = list(first_rows)
        found = dict(zip(keys, await self.cache.get(self.reference, keys), strict=True))
        lacking = [key for key in keys if found[key] is None]
        if lacking:
            fresh = await self._infer(shard, lacking, [first_rows[key] for key in lacking])
            found |= await self.cache.put(self.reference, fresh)
        return ShardResult(
            keys=tuple(keys), embeddings=b"".join(found[key] or b"" for key in keys), inferred=len(lacking)
        )

    async def _infer(self, shard: Shard, keys: list[str], rows: list[int]) -> dict[str, bytes]:
        inputs = {name: array[rows] for name, array in _features(shard).items()}
        embedded = (await self.model.embed(inputs)).astype(np.float16)
        return {key: embedded[i].tobytes() for i, key in enumerate(keys)}


def _features(shard: Shard) -> dict[str, npt.NDArray[Any]]:
    try:
        description, data = records.unpack(shard.features)
        arrays, offset = {}, 0
        for tensor in description["tensors"]:
            dtype = DATATYPES[tensor["datatype"]].numpy
            count = int(np.prod(tensor["shape"]))
            arrays[tensor["name"]] = np.frombuffer(data, dtype, count, offset).reshape(tensor["shape"])
            offset += count * dtype.itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise UnscorableShard("FEATURES_UNREADABLE", f"{type(error).__name__}: {error}") from error
    return arrays
