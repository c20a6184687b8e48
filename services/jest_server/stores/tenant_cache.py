"""An embedding cache as one of several tenants may see it, where they do not share what they put there.

Were it shared, a tenant could tell by timing whether another has used an example whose key it knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from jest_server.domain.ports import EmbeddingCache
from jest_server.domain.tenants import SEPARATOR, owner_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.storage import CacheStats, Lease


class TenantCache(EmbeddingCache):
    """A cache under example keys that no other tenant can have: no tenant's name holds the separator."""

    def __init__(self, cache: EmbeddingCache, tenant: str) -> None:
        self._cache = cache
        self._prefix = f"{tenant}{SEPARATOR}"

    @override
    def for_tenant_of(self, job: str) -> EmbeddingCache:
        return self._cache.for_tenant_of(job)

    @override
    async def get(self, reference: ReferenceInfo, keys: Sequence[str]) -> list[bytes | None]:
        return await self._cache.get(reference, self._own(keys))

    @override
    async def put(self, reference: ReferenceInfo, values: Mapping[str, bytes]) -> dict[str, bytes]:
        kept = await self._cache.put(reference, {self._prefix + key: value for key, value in values.items()})
        return {key.removeprefix(self._prefix): value for key, value in kept.items()}

    @override
    async def take(
        self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str, ttl_s: float
    ) -> list[bytes | Lease]:
        return await self._cache.take(reference, self._own(keys), owner=owner, ttl_s=ttl_s)

    @override
    async def renew(self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str, ttl_s: float) -> None:
        await self._cache.renew(reference, self._own(keys), owner=owner, ttl_s=ttl_s)

    @override
    async def release_leases(self, reference: ReferenceInfo, keys: Sequence[str], *, owner: str) -> None:
        await self._cache.release_leases(reference, self._own(keys), owner=owner)

    @override
    async def stats(self) -> CacheStats:
        return await self._cache.stats()

    @override
    async def ping(self) -> None:
        await self._cache.ping()

    @override
    async def close(self) -> None:
        await self._cache.close()

    def _own(self, keys: Sequence[str]) -> list[str]:
        return [self._prefix + key for key in keys]


def for_job(cache: EmbeddingCache, job: str, *, shared: bool) -> EmbeddingCache:
    """Return the part of a cache that a job may see, all of it where tenants share it or there are none."""
    tenant = owner_of(job)
    return cache if shared or not tenant else TenantCache(cache, tenant)
