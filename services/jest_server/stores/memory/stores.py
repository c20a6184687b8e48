"""The four stores of the queue in this process's memory: for unit tests, and for machines without Redis or Valkey.

The same promises as the real ones, except that everything is gone with the process.
"""

from __future__ import annotations

from jest_server.domain.ports import Stores
from jest_server.stores.memory.decisions import MemoryDecisionLog
from jest_server.stores.memory.jobs import MemoryJobStore
from jest_server.stores.memory.shard_queue import MemoryShardQueue
from jest_server.stores.memory.state import MemoryState
from jest_server.stores.memory.super_batches import MemorySuperBatchStore


def open_memory_stores() -> Stores:
    """Return empty stores over one state."""
    state = MemoryState()
    return Stores(
        connection=state,
        jobs=MemoryJobStore(state),
        super_batches=MemorySuperBatchStore(state),
        queue=MemoryShardQueue(state),
        decisions=MemoryDecisionLog(state),
    )
