"""The use case of scoring one shard: embed what is neither cached nor being embedded, cache it, complete the shard.

Single flight: an embedding is computed by the holder of its lease in the cache. All others wait for the value, or for
the lease, if its holder went silent. No scorer waits while holding a lease, so one of them always makes progress.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jest_server.domain.errors import ReferenceModelError, StoreUnavailable, UnreadableSource
from jest_server.domain.shards import ShardResult
from jest_server.domain.storage import Lease
from jest_server.runtime.logs import get_logger
from jest_server.scorer.halving import embed_by_halves
from jest_server.stores import blobs
from jest_wire import tracing
from jest_wire.tensors import DATATYPES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from jest_server.domain.ports import EmbeddingCache, ExampleSources, ReferenceModel
    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.shards import Shard


FIRST_PAUSE_S = 0.005
LONGEST_PAUSE_S = 0.1
NAMED_EXAMPLES = 5
"""How many of several examples that failed are named beside the first."""
_log = get_logger()


class UnscorableShard(Exception):
    """No retry can score this shard; `reason` is a constant, the message tells the rest."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Scoring:
    """Score shards for one reference model at one version.

    `lease_s` is how long others wait for an embedding whose scorer went silent.
    """

    cache: EmbeddingCache
    model: ReferenceModel
    reference: ReferenceInfo
    lease_s: float = 10.0
    sources: ExampleSources | None = None
    """None: this scorer reads no examples by reference."""
    on_extra_pass: Callable[[], None] = lambda: None
    """Called for each inference that is made only to find the examples that an earlier one failed for."""

    async def score(self, shard: Shard, *, on_wait: Callable[[], None] = lambda: None) -> ShardResult:
        """Return the embeddings of all the shard's keys, rounded as the cache holds them.

        Cached and fresh embeddings are the same bytes, so a selection does not depend on which of the two it got.
        `on_wait` is called when there is nothing left to do but to wait for others, perhaps several times.

        Raises:
            UnscorableShard: If the shard wants another model version, or its features cannot be read.
            ReferenceModelError: If the inference failed. If it failed for some examples only, the message names them,
                and all others are cached.
            StoreUnavailable: If the cache does not answer.
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
        cache = self.cache.for_tenant_of(shard.job)
        owner, inferred, pause_s = secrets.token_hex(8), 0, FIRST_PAUSE_S
        with tracing.span("scorer.cache"):
            values = await cache.get(self.reference, keys)
        found = {key: value for key, value in zip(keys, values, strict=True) if value is not None}
        while lacking := [key for key in keys if key not in found]:
            taken = await cache.take(self.reference, lacking, owner=owner, ttl_s=self.lease_s)
            found |= {key: value for key, value in zip(lacking, taken, strict=True) if isinstance(value, bytes)}
            mine = [key for key, whose in zip(lacking, taken, strict=True) if whose is Lease.MINE]
            if mine:
                async with self._holding(cache, mine, owner):
                    fresh, failures = await self._infer(shard, mine, [first_rows[key] for key in mine])
                    found |= await cache.put(self.reference, fresh)
                if failures:
                    raise _examples_failed(first_rows, failures)
                inferred += len(mine)
            elif len(found) < len(keys):
                on_wait()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return ShardResult(keys=tuple(keys), embeddings=b"".join(found[key] for key in keys), inferred=inferred)

    @asynccontextmanager
    async def _holding(self, cache: EmbeddingCache, keys: list[str], owner: str) -> AsyncIterator[None]:
        """Keep leases alive for the length of the block, then gives them back, whatever happened."""
        renewing = asyncio.create_task(self._renew(cache, keys, owner))
        try:
            yield
        finally:
            renewing.cancel()
            try:
                await cache.release_leases(self.reference, keys, owner=owner)
            except StoreUnavailable as error:
                _log.warning("leases are left to expire", count=len(keys), error=str(error))

    async def _renew(self, cache: EmbeddingCache, keys: list[str], owner: str) -> None:
        while True:
            await asyncio.sleep(self.lease_s / 3)
            try:
                await cache.renew(self.reference, keys, owner=owner, ttl_s=self.lease_s)
            except StoreUnavailable as error:
                _log.warning("leases could not be renewed", count=len(keys), error=str(error))

    async def _infer(
        self, shard: Shard, keys: list[str], rows: list[int]
    ) -> tuple[dict[str, bytes], dict[str, ReferenceModelError]]:
        """Return the embeddings of the keys, and why some have none."""
        description, data = _unpacked(shard)
        if "sources" in description:
            inputs = await self._read([description["sources"][row] for row in rows])
        else:
            inputs = {name: array[rows] for name, array in _features(description, data).items()}
        with tracing.span("scorer.infer"):
            embedded = await embed_by_halves(self.model, inputs, on_extra_pass=self.on_extra_pass)
        fresh = {keys[row]: array.astype(np.float16).tobytes() for row, array in embedded.embeddings.items()}
        return fresh, {keys[row]: error for row, error in embedded.failures.items()}

    async def _read(self, sources: list[str]) -> dict[str, npt.NDArray[Any]]:
        if self.sources is None:
            raise UnscorableShard("SOURCES_NOT_READ", "this scorer reads no sources: JEST_SOURCE_PREFIXES is empty")
        try:
            with tracing.span("scorer.read"):
                return await self.sources.inputs(self.reference, sources)
        except UnreadableSource as error:
            raise UnscorableShard(error.reason, str(error)) from error


def _examples_failed(rows: Mapping[str, int], failures: Mapping[str, ReferenceModelError]) -> ReferenceModelError:
    (key, error), *others = failures.items()
    message = f"example {key!r} (row {rows[key]}): {error}"
    if others:
        named = ", ".join(repr(other) for other, _ in others[:NAMED_EXAMPLES])
        message += f"; and {len(others)} more: {named}{', ...' if len(others) > NAMED_EXAMPLES else ''}"
    return ReferenceModelError(message, retryable=all(error.retryable for error in failures.values()))


def _unpacked(shard: Shard) -> tuple[dict[str, Any], memoryview]:
    try:
        return blobs.unpack(shard.features)
    except (TypeError, ValueError) as error:
        raise UnscorableShard("FEATURES_UNREADABLE", f"{type(error).__name__}: {error}") from error


def _features(description: dict[str, Any], data: memoryview) -> dict[str, npt.NDArray[Any]]:
    try:
        arrays, offset = {}, 0
        for tensor in description["tensors"]:
            dtype = DATATYPES[tensor["datatype"]].numpy
            count = int(np.prod(tensor["shape"]))
            arrays[tensor["name"]] = np.frombuffer(data, dtype, count, offset).reshape(tensor["shape"])
            offset += count * dtype.itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise UnscorableShard("FEATURES_UNREADABLE", f"{type(error).__name__}: {error}") from error
    return arrays
