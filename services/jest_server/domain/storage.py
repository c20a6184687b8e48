"""What the queue and the embedding cache report about themselves, and who computes an embedding that is missing."""

from __future__ import annotations

import enum

from jest_server.domain.frozen_model import FrozenModel


class MemoryUse(FrozenModel):
    """What a store's server says of its memory."""

    used_bytes: int
    max_bytes: int
    """0: no limit."""


class CacheStats(FrozenModel):
    """What the embedding cache says of itself, of all models together."""

    values: int
    """Embeddings and leases held."""
    used_bytes: int
    max_bytes: int
    """0: no limit."""
    hits: int
    """Read since it started that found a value; and the others."""
    misses: int
    evicted: int


class Lease(enum.IntEnum):
    """Who computes an embedding that is not there yet."""

    OTHERS = 0
    MINE = 1
