"""The four stores of the queue in this process's memory: for unit tests, and for machines without Redis or Valkey.

The same promises as the real ones, except that everything is gone with the process.
"""

from __future__ import annotations

from jest_server.domain.ports import Stores
from support.memory_stores.decisions import MemoryDecisionLog
from support.memory_stores.jobs import MemoryJobStore
from support.memory_stores.shard_queue import MemoryShardQueue
from support.memory_stores.state import MemoryState
from support.memory_stores.super_batches import MemorySuperBatchStore


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
