"""An embedding cache as one of several tenants may know it, where they do not share what they put there.

Were it shared, a tenant could tell by timing whether another has used an example whose key it knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jest_server.domain.tenants import SEPARATOR, owner_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_server.domain.ports import EmbeddingCache
    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.storage import CacheStats, Lease


class TenantCache:
    """A cache under example keys that no other tenant can have: no tenant's name holds the separator."""

    def __init__(self, cache: EmbeddingCache, tenant: str) -> None:
        self._cache = cache
        self._prefix = f"{tenant}{SEPARATOR}"

    def of_job(self, job: str) -> EmbeddingCache:
        """See the port."""
        return self._cache.of_job(job)

    async def get(self, reference: ReferenceInfo, keys: Sequence[str]) -> list[bytes | None]:
        """See the port."""
        return await self._cache.get(reference, self._own(keys))

    async def put(self, reference: ReferenceInfo, values: Mapping[str, bytes]) -> dict[str, bytes]:
        """See the port."""
        kept = await self._cache.put(reference, {self._prefix + key: value for key, value in values.items()})
        return {key.removeprefix(self._prefix): value for key, value in kept.items()}

    async def take(
        self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str, ttl_s: float
    ) -> list[bytes | Lease]:
        """See the port."""
        return await self._cache.take(reference, self._own(keys), owner=owner, ttl_s=ttl_s)

    async def renew(self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str, ttl_s: float) -> None:
        """See the port."""
        await self._cache.renew(reference, self._own(keys), owner=owner, ttl_s=ttl_s)

    async def give_back(self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str) -> None:
        """See the port."""
        await self._cache.give_back(reference, self._own(keys), owner=owner)

    async def stats(self) -> CacheStats:
        """See the port."""
        return await self._cache.stats()

    async def ping(self) -> None:
        """See the port."""
        await self._cache.ping()

    async def close(self) -> None:
        """See the port."""
        await self._cache.close()

    def _own(self, keys: Sequence[str]) -> list[str]:
        return [self._prefix + key for key in keys]


def for_job(cache: EmbeddingCache, job: str, *, shared: bool) -> EmbeddingCache:
    """Returns the part of a cache that a job may know, all of it where tenants share it or there are none."""
    tenant = owner_of(job)
    return cache if shared or not tenant else TenantCache(cache, tenant)
