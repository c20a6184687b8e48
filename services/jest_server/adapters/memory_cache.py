"""EmbeddingCache in this process's memory, bounded: the embeddings that were asked for longest ago go first."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_server.model import ReferenceInfo

_BATCH = 1000
DEFAULT_MAX_BYTES = 1 << 30

Key = tuple[str, str, str, str]


class MemoryEmbeddingCache:
    """Reference embeddings in a dictionary of at most ``max_bytes`` of values."""

    def __init__(self, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._values: OrderedDict[Key, bytes] = OrderedDict()

    async def get(self, reference: ReferenceInfo, keys: Sequence[str]) -> list[bytes | None]:
        """See the port."""
        size = reference.value_bytes
        found: list[bytes | None] = []
        for row, key in enumerate(keys):
            if row % _BATCH == _BATCH - 1:
                await asyncio.sleep(0)  # nobody else of this event loop should wait for all of them
            name = _key(reference, key)
            value = self._values.get(name)
            if value is not None:
                self._values.move_to_end(name)
            found.append(value if value is not None and len(value) == size else None)
        return found

    async def put(self, reference: ReferenceInfo, values: Mapping[str, bytes]) -> None:
        """See the port."""
        for key, value in values.items():
            self._held_bytes += len(value) - len(self._values.pop(_key(reference, key), b""))
            self._values[_key(reference, key)] = value
        while self._held_bytes > self._max_bytes:
            _, evicted = self._values.popitem(last=False)
            self._held_bytes -= len(evicted)

    async def ping(self) -> None:
        """See the port."""

    async def close(self) -> None:
        """See the port."""


def _key(reference: ReferenceInfo, key: str) -> Key:
    return reference.name, reference.version, reference.preprocessing_id, key
