"""Versions of reference models as scorers announced them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from jest_server.domain.references import ReferenceInfo
from jest_server.stores.redis.connection import run, translate_redis_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jest_server.stores.redis.context import RedisContext

REFERENCE: TypeAdapter[ReferenceInfo | None] = TypeAdapter(ReferenceInfo | None)
"""How super-batches keep the version that they were submitted for."""


@dataclass(frozen=True)
class AnnouncedVersion:
    """A version of a reference model, as scorers announced it."""

    info: ReferenceInfo
    since_ms: int
    unserved_s: float
    """How long ago the last announcement expired; negative while it holds."""

    @property
    def served(self) -> bool:
        """Whether scorers serve it at the moment."""
        return self.unserved_s < 0

    @classmethod
    def of(cls, record: Mapping[str, Any], now_ms: int) -> AnnouncedVersion:
        """Read a record that `announce.lua` wrote."""
        info = ReferenceInfo.model_validate_json(record["info"])
        return cls(info, int(record["since_ms"]), (now_ms - record["until_ms"]) / 1000)


async def versions_of(context: RedisContext, name: str) -> list[AnnouncedVersion]:
    """Return all versions of a model that are remembered."""
    async with translate_redis_errors("queue"), context.client.pipeline(transaction=False) as pipe:
        pipe.hvals(context.keys.reference(name))
        pipe.time()
        held, (seconds, microseconds) = await run(pipe)
    now_ms = seconds * 1000 + microseconds // 1000
    return [AnnouncedVersion.of(json.loads(record), now_ms) for record in held]
