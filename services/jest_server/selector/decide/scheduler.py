"""Which selection is computed next, when those of many jobs wait for the same few threads.

Start-time fair queueing between jobs, by the cost of their selections: a small job waits for the selection that runs,
never for all that a large job has queued.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from jest_server.domain.errors import Stopping
from jest_server.domain.fair_queueing import StartTimeFairQueue, check_cost
from jest_server.runtime.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

RETRY_S = 0.5
"""When to retry a call to a selector that is stopping: another one, or its successor, answers."""
T = TypeVar("T")
_log = get_logger()


@dataclass(frozen=True, eq=False)
class Waiting(Generic[T]):
    """One piece of a job's work that has not started."""

    job: str
    cost: float
    arrival: int
    item: T


class FairQueue(Generic[T]):
    """Work of many jobs in the order to start it: fair between jobs, first come first served inside a job.

    A piece that is taken back costs its job nothing.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Waiting[T]]] = {}
        self._turns = StartTimeFairQueue()
        self._arrivals = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, job: str, cost: float, item: T) -> Waiting[T]:
        """Add a piece of work; its cost is relative to others'.

        Raises:
            ValueError: If the cost is not a finite number larger than 0; work without a cost would always be first.
        """
        check_cost(cost)
        waiting = Waiting(job, cost, self._arrivals, item)
        self._arrivals += 1
        self._turns.join(job)
        self._queues.setdefault(job, deque()).append(waiting)
        return waiting

    def first(self) -> Waiting[T] | None:
        """Return the piece to start next, or None if nothing waits. O(number of jobs that wait)."""
        heads = (queue[0] for queue in self._queues.values())
        return min(heads, key=lambda head: (self._turns.of(head.job), head.arrival), default=None)

    def start(self, first: Waiting[T]) -> None:
        """Remove the piece that `first` returned, and charge its job for it."""
        self._turns.take(first.job, cost=first.cost)
        self.take_back(first)

    def take_back(self, waiting: Waiting[T]) -> None:
        """Remove a piece without a charge; does nothing if it was removed before."""
        queue = self._queues.get(waiting.job, deque())
        if waiting in queue:
            queue.remove(waiting)
        if not queue:
            self._queues.pop(waiting.job, None)
            self._turns.leave(waiting.job)

    def reset(self) -> None:
        """Reset virtual time; call it when nothing waits and nothing runs."""
        assert not self._queues, "work still waits"
        self._turns = StartTimeFairQueue()


@dataclass(frozen=True, eq=False)
class _Work:
    """A caller's work, and the future of its result."""

    call: Callable[[], Any]
    answer: asyncio.Future[Any]


class SelectionScheduler:
    """Runs selections in threads, in an order that is fair to the jobs; used by one event loop.

    A running selection is not interrupted, so with one thread every other one waits for its end, however small. More
    threads let small ones pass, and cost memory: each computes a selection of its own.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="selection")
        self._queue: FairQueue[_Work] = FairQueue()
        self._running = 0
        self._closed = False

    async def run(self, job: str, cost: float, work: Callable[[], T]) -> T:
        """Run the work in a thread, with the caller's context variables, when it is the job's turn.

        A caller that is cancelled takes its work back; if that runs already, it runs to its end and its result is lost.

        Args:
            job: charged for the work.
            cost: how much work it is, relative to that of others.
            work: called once, in a thread.

        Raises:
            Stopping: If the scheduler is closed, or closes before the work was started.
            ValueError: If the cost is not a finite number larger than 0.
            Exception: Whatever ``work`` raises.
        """
        if self._closed:
            raise _stopping()
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        waiting = self._queue.add(job, cost, _Work(partial(copy_context().run, work), answer))
        self._start_what_fits()
        try:
            return await answer
        finally:
            self._queue.take_back(waiting)

    def close(self) -> None:
        """Refuse new work, fail what waits, and block until what runs has ended."""
        self._closed = True
        while (waiting := self._queue.first()) is not None:
            self._queue.take_back(waiting)
            if not waiting.item.answer.done():
                waiting.item.answer.set_exception(_stopping())
        self._executor.shutdown()

    def _start_what_fits(self) -> None:
        while self._running < self._threads and (first := self._queue.first()) is not None:
            if first.item.answer.cancelled():  # its caller has not taken it back yet
                self._queue.take_back(first)
                continue
            self._queue.start(first)
            self._running += 1
            running = asyncio.get_running_loop().run_in_executor(self._executor, first.item.call)
            running.add_done_callback(partial(self._finish, first.item.answer))
        if not self._running:
            self._queue.reset()

    def _finish(self, answer: asyncio.Future[Any], done: asyncio.Future[Any]) -> None:
        self._running -= 1
        self._start_what_fits()
        error = done.exception()
        if answer.cancelled():
            if error is not None:
                _log.warning("work of a cancelled call failed", error=repr(error))
        elif error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(done.result())


def _stopping() -> Stopping:
    return Stopping("the selector is stopping; call again", retry_after_s=RETRY_S)
