"""Works on an iterable in a background thread, a bounded number of items ahead of the consumer."""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from jest_trainer._rpc.channel import forked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Item = TypeVar("Item")
Result = TypeVar("Result")

_JOIN_S = 1.0
"""How long closing waits for the thread: an iterable that blocks in next() cannot be interrupted, only left behind."""


class Prefetch(Generic[Item, Result]):
    """An iterator over `work(item)` for each item, in order.

    At most `limit` items have been pulled and not been taken, the one being worked on included. What the iterable or
    `work` raises comes out of `next`, after the results before it. The iterable's `iter` is called here, in
    the caller's thread; its `next` in the background thread.

    Args:
        items: what to work on.
        work: called in the background thread.
        limit: how far to run ahead, at least 1.
        name: the thread's.
        waiting: set while the consumer waits for a result and none is ready, for `work` to look at.
        cancel: makes `work` return or raise soon; called once, by `close`.
        drop: called with every result that will not be taken any more.
    """

    def __init__(
        self,
        items: Iterable[Item],
        work: Callable[[Item], Result],
        *,
        limit: int,
        name: str,
        waiting: threading.Event,
        cancel: Callable[[], None],
        drop: Callable[[Result], None] = lambda _: None,
    ) -> None:
        self._items = iter(items)
        self._work = work
        self._limit = limit
        self._waiting = waiting
        self._cancel = cancel
        self._drop = drop
        self._changed = threading.Condition()
        self._ready: deque[Result] = deque()
        self._error: BaseException | None = None
        self._finished = False
        self._closed = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        # A thread that the interpreter's end catches inside C++ code (torch, gRPC) aborts the process.
        atexit.register(self.close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Result:
        if os.getpid() != self._process:  # before the lock, which the thread may have held when it was copied
            raise forked("the next super-batch", self._process)
        with self._changed:
            if not self._is_over_or_ready():
                self._waiting.set()
                try:
                    self._changed.wait_for(self._is_over_or_ready)
                finally:
                    self._waiting.clear()
            if self._closed:
                raise RuntimeError("this pass over the super-batches was closed, or ended by a later one")
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and drop what is ready. Safe to repeat, and from any thread."""
        if os.getpid() != self._process:
            return
        atexit.unregister(self.close)
        with self._changed:
            if self._closed:
                return
            self._closed = True
            dropped = list(self._ready)
            self._ready.clear()
            self._error = None
            self._changed.notify_all()
        self._cancel()
        for result in dropped:
            self._drop(result)
        if threading.current_thread() is not self._thread:  # the garbage collector may close from anywhere
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while self._await_room():
                try:
                    item = next(self._items)
                except StopIteration:
                    break
                result = self._work(item)
                del item
                self._deliver(result)
                del result
        except BaseException as raised:  # noqa: BLE001 - raised again by __next__, in the thread that can handle it
            error = raised
        finally:
            # The iterable is released here, in the thread that pulled from it.
            del self._items
            with self._changed:
                self._error = None if self._closed else error
                self._finished = True
                self._changed.notify_all()

    def _is_over_or_ready(self) -> bool:
        return bool(self._ready) or self._finished or self._closed

    def _await_room(self) -> bool:
        """Return whether there is room for another result; False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self._limit)
            return not self._closed

    def _deliver(self, result: Result) -> None:
        with self._changed:
            if not self._closed:
                self._ready.append(result)
                self._waiting.clear()
                self._changed.notify_all()
                return
        self._drop(result)
