"""Work in threads, so that the event loop answers other calls meanwhile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

THREAD_FROM_BYTES = 1 << 20
"""Looking at fewer bytes takes less time than handing them to a thread."""


async def in_thread_if_large(nbytes: int, work: Callable[[], T]) -> T:
    """Do work that looks at `nbytes` bytes, in a thread if they are many."""
    return work() if nbytes < THREAD_FROM_BYTES else await asyncio.to_thread(work)


async def run_uncancelled(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Work in a thread and wait for its end even if cancelled, so that no thread outlives its caller."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    finally:
        await asyncio.wait([task])
