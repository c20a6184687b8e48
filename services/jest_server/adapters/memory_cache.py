"""EmbeddingCache in this process's memory, bounded: the embeddings that were asked for longest ago go first."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING

from jest_server.embedding_codec import CODECS, decoded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_server.embedding_codec import Precision
    from jest_server.model import ReferenceInfo

_BATCH = 1000
DEFAULT_MAX_BYTES = 1 << 30

Key = tuple[str, str, str, str]


class MemoryEmbeddingCache:
    """Reference embeddings in a dictionary of at most ``max_bytes`` of values."""

    def __init__(self, *, max_bytes: int = DEFAULT_MAX_BYTES, precision: Precision = "float16") -> None:
        self._max_bytes = max_bytes
        self._codec = CODECS[precision]
        self._held_bytes = 0
        self._values: OrderedDict[Key, bytes] = OrderedDict()

    async def get(self, reference: ReferenceInfo, keys: Sequence[str]) -> list[bytes | None]:
        """See the port."""
        found: list[bytes | None] = []
        for start in range(0, len(keys), _BATCH):
            held = [self._touched(_key(reference, key)) for key in keys[start : start + _BATCH]]
            found += decoded(self._codec, held, reference)
            await asyncio.sleep(0)  # nobody else of this event loop should wait for all of them
        return found

    async def put(self, reference: ReferenceInfo, values: Mapping[str, bytes]) -> dict[str, bytes]:
        """See the port."""
        encoded = self._codec.encode(list(values.values()), reference.embedding_width)
        for key, value in zip(values, encoded, strict=True):
            self._held_bytes += len(value) - len(self._values.pop(_key(reference, key), b""))
            self._values[_key(reference, key)] = value
        while self._held_bytes > self._max_bytes:
            _, evicted = self._values.popitem(last=False)
            self._held_bytes -= len(evicted)
        return dict(zip(values, self._codec.decode(encoded, reference.embedding_width), strict=True))

    async def ping(self) -> None:
        """See the port."""

    async def close(self) -> None:
        """See the port."""

    def _touched(self, key: Key) -> bytes | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value


def _key(reference: ReferenceInfo, key: str) -> Key:
    return reference.name, reference.version, reference.preprocessing_id, key
