import asyncio
import threading

import pytest

from jest_server.selector.threads import run_uncancelled


async def test_who_is_cancelled_while_a_thread_works_waits_for_its_end():
    begun, may_end, ended = threading.Event(), threading.Event(), []

    def work():
        begun.set()
        may_end.wait()
        ended.append(True)

    task = asyncio.create_task(run_uncancelled(work))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended
