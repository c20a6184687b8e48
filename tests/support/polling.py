"""Waiting for what a real server does in its own time, and measuring how long it took."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager

TICK_S = 0.01


async def wait_for(condition, timeout_s=30.0):
    """Polls an async condition until it holds, and returns what it gave."""
    async with asyncio.timeout(timeout_s):
        while not (found := await condition()):
            await asyncio.sleep(0.01)
    return found


def wait_until(holds, *, timeout_s=30):
    """Polls a condition until it holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "the condition did not come to hold"
        time.sleep(0.01)


@contextmanager
def within(limit_s):
    """Assert that the block takes less than this, not counting the time by which a busy machine was late.

    A thread that sleeps in short steps measures that lateness: it is near zero on an idle machine, where the limit
    is as strict as it reads.
    """
    late_s, over = 0.0, threading.Event()

    def watch():
        nonlocal late_s
        while True:
            asleep = time.monotonic()
            if over.wait(TICK_S):
                return
            late_s += time.monotonic() - asleep - TICK_S

    watcher = threading.Thread(target=watch, name="lateness")
    watcher.start()
    started = time.monotonic()
    try:
        yield
        took_s = time.monotonic() - started
    finally:
        over.set()
        watcher.join()
    assert took_s - late_s < limit_s, f"took {took_s:.2f} s, of which the machine was late by {late_s:.2f} s"
