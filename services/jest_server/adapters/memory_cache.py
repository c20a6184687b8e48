"""EmbeddingCache in this process's memory, bounded: the embeddings that were asked for longest ago go first."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_server.model import ReferenceInfo

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
        found = [self._values.get(_key(reference, key)) for key in keys]
        for key, value in zip(keys, found, strict=True):
            if value is not None:
                self._values.move_to_end(_key(reference, key))
        return [value if value is not None and len(value) == size else None for value in found]

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
