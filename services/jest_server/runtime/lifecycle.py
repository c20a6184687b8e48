"""How a process starts, runs periodic work, and stops."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from jest_server.domain import errors
from jest_server.runtime.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

SWITCH_INTERVAL_S = 0.001
"""How long a thread may run Python code before one that answers gets its turn; the default is five times that."""
_log = get_logger()


def tune_for_latency() -> None:
    """Sets the interpreter up so that threads at work and the garbage collector hold answers up as little as possible.

    To be called once, when everything is imported: those objects stay for good, and looking through all of them again
    and again took the collector a tenth of a second.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()


def stop_on_signals() -> asyncio.Event:
    """Returns an event that the first SIGTERM or SIGINT sets; to be called inside the running loop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


@asynccontextmanager
async def background(*jobs: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Runs each job until the block ends; a job that ends or fails before that brings the whole block down."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_endless(job)) for job in jobs]
        yield
        for task in tasks:
            task.cancel()


async def _endless(job: Callable[[], Awaitable[None]]) -> None:
    await job()
    raise RuntimeError(f"{job!r} ended, expected to run until cancelled")


async def every(interval_s: float | Callable[[], float], action: Callable[[], Awaitable[None]], *, name: str) -> None:
    """Repeat an action until cancelled; a failure is logged, and the action is tried again after the interval."""
    while True:
        try:
            await action()
        except errors.JestServerError as error:
            _log.warning("periodic action failed", action=name, message=error.message)
        await asyncio.sleep(interval_s() if callable(interval_s) else interval_s)
