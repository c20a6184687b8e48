"""How blobs are laid out in a store: one line of JSON that describes, then raw bytes.

Features, shard results and nothing else use it; there is no pickle anywhere.
"""

from __future__ import annotations

import json
from typing import Any

_SEPARATOR = b"\n"


def pack(description: dict[str, Any], *buffers: bytes | bytearray | memoryview) -> bytes:
    """Join a JSON-serialisable description and the buffers it describes."""
    head = json.dumps(description, separators=(",", ":"), ensure_ascii=False).encode()
    return b"".join((head, _SEPARATOR, *buffers))


def unpack(blob: bytes) -> tuple[dict[str, Any], memoryview]:
    """Split what `pack` joined; the second part is a view into `blob`, not a copy.

    Raises:
        ValueError: If `blob` does not start with a line of JSON.
    """
    end = blob.find(_SEPARATOR)
    if end < 0:
        raise ValueError(f"record of {len(blob)} bytes has no description line")
    description = json.loads(blob[:end])
    return dict(description), memoryview(blob)[end + 1 :]
