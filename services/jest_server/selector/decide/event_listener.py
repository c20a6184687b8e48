"""Wakes selections that wait for their super-batch, when the store reports that something happened to it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jest_server.domain.ports import SuperBatchStore
    from jest_server.domain.super_batches import SuperBatchRef


class EventListener:
    """Listens to super-batch events for the selections that wait."""

    def __init__(self, super_batches: SuperBatchStore) -> None:
        self._super_batches = super_batches
        self._waiting: defaultdict[SuperBatchRef, set[asyncio.Event]] = defaultdict(set)

    async def listen(self) -> None:
        """Set the events of every super-batch that the store reports, until cancelled."""
        async for happened in self._super_batches.events():
            for event in self._waiting.get(happened.ref, ()):
                event.set()

    @contextmanager
    def events_of(self, ref: SuperBatchRef) -> Iterator[asyncio.Event]:
        """Provide an `asyncio.Event` that is set at each event of the super-batch, inside the block."""
        event = asyncio.Event()
        self._waiting[ref].add(event)
        try:
            yield event
        finally:
            self._waiting[ref].discard(event)
            if not self._waiting[ref]:
                del self._waiting[ref]
