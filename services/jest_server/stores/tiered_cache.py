"""EmbeddingCache of two tiers: one in memory, as without this, and files behind it for data sets that outgrow it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from jest_server.domain.ports import EmbeddingCache

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.storage import CacheStats, Lease
    from jest_server.runtime.metrics import EmbeddingFileMetrics
    from jest_server.runtime.settings import ProcessSettings
    from jest_server.stores.embedding_files.files import EmbeddingFiles


class TieredEmbeddingCache(EmbeddingCache):
    """What the first tier lacks is looked up in files and kept in the first tier, whose precision is everyone's.

    All that is not `get` is the first tier's.
    """

    def __init__(self, first: EmbeddingCache, files: EmbeddingFiles) -> None:
        self._first = first
        self._files = files

    @override
    def for_tenant_of(self, job: str) -> EmbeddingCache:
        """The files are the deployment's own: all jobs may know them."""
        return TieredEmbeddingCache(self._first.for_tenant_of(job), self._files)

    @override
    async def get(self, reference: ReferenceInfo, keys: Sequence[str]) -> list[bytes | None]:
        values = await self._first.get(reference, keys)
        lacking = list(dict.fromkeys(key for key, value in zip(keys, values, strict=True) if value is None))
        read = zip(lacking, await self._files.get(reference, lacking), strict=True)
        found = {key: value for key, value in read if value is not None}
        if not found:
            return values
        # Rounded as the first tier does, so that a selection does not depend on where a row came from.
        kept = await self._first.put(reference, found)
        return [kept.get(key) if value is None else value for key, value in zip(keys, values, strict=True)]

    @override
    async def put(self, reference: ReferenceInfo, values: Mapping[str, bytes]) -> dict[str, bytes]:
        return await self._first.put(reference, values)

    @override
    async def take(
        self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str, ttl_s: float
    ) -> list[bytes | Lease]:
        """Files are looked into by `get`, which comes before: what they have is in the first tier."""
        return await self._first.take(reference, keys, owner=owner, ttl_s=ttl_s)

    @override
    async def renew(self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str, ttl_s: float) -> None:
        await self._first.renew(reference, keys, owner=owner, ttl_s=ttl_s)

    @override
    async def release_leases(self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str) -> None:
        await self._first.release_leases(reference, keys, owner=owner)

    @override
    async def stats(self) -> CacheStats:
        return await self._first.stats()

    @override
    async def ping(self) -> None:
        """Files are optional: only the first tier counts."""
        await self._first.ping()

    @override
    async def close(self) -> None:
        await self._files.close()
        await self._first.close()


def with_embedding_files(
    cache: EmbeddingCache, settings: ProcessSettings, metrics: EmbeddingFileMetrics
) -> EmbeddingCache:
    """Return the cache with files behind it if the settings name some.

    Raises:
        ValueError: If the URL is not one that can be read here.
    """
    if not settings.embeddings_url:
        return cache
    from jest_server.stores.embedding_files.files import EmbeddingFiles  # noqa: PLC0415 - most processes need no fsspec

    try:
        files = EmbeddingFiles(
            settings.embeddings_url,
            metrics,
            refresh_s=settings.embeddings_refresh_s,
            timeout_s=settings.embeddings_timeout_s,
        )
    except ValueError as error:
        raise ValueError(f"JEST_EMBEDDINGS_URL: {error}") from error
    return TieredEmbeddingCache(cache, files)
