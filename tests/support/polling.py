"""Waiting for what a real server does in its own time."""

from __future__ import annotations

import asyncio
import time


async def wait_for(condition, timeout_s=10.0):
    """Polls an async condition until it holds, and returns what it gave."""
    async with asyncio.timeout(timeout_s):
        while not (found := await condition()):
            await asyncio.sleep(0.01)
    return found


def wait_until(holds, *, timeout_s=30):
    """Polls a condition until it holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
