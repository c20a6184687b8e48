"""How long calls may take, and how another thread ends them early."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import grpc


class Cancelled(Exception):
    """The calls of this thread were ended by `Cancellation.cancel`."""


class Cancellation:
    """Ends the calls that one thread makes: the one in flight and all to come."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()
        self._in_flight: grpc.Future[Any] | None = None

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End everything; safe from any thread, and more than once."""
        self._cancelled.set()
        call = self._in_flight
        if call is not None:
            call.cancel()

    def sleep(self, seconds: float) -> None:
        """Sleep, but not beyond cancellation; zero seconds only look whether there was one.

        Raises:
            Cancelled: `cancel` was called.
        """
        if self._cancelled.wait(seconds):
            raise Cancelled

    @contextmanager
    def watching(self, call: grpc.Future[Any]) -> Iterator[None]:
        """Hold a call in flight: it is cancelled together with this object, or by leaving the block with an error."""
        # The call is published before the flag is read, and cancel() does it the other way round: one of both sees it.
        self._in_flight = call
        try:
            self.sleep(0.0)
            yield
        except BaseException:
            call.cancel()
            raise
        finally:
            self._in_flight = None


class Deadline:
    """A moment by which an operation must end, shared by all its calls."""

    def __init__(self, seconds: float, cancellation: Cancellation | None = None) -> None:
        self.seconds = seconds
        self.cancellation = cancellation or Cancellation()
        self._at = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(self._at - time.monotonic(), 0.0)
