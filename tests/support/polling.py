"""Waiting for what a real server does in its own time."""

from __future__ import annotations

import asyncio


async def wait_for(condition, timeout_s=10.0):
    """Polls an async condition until it holds, and returns what it gave."""
    async with asyncio.timeout(timeout_s):
        while not (found := await condition()):
            await asyncio.sleep(0.01)
    return found
