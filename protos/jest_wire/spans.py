"""The span of a super-batch's life, as it is without tracing; apart from `tracing` so that `_otel` can build on it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

NOTHING: AbstractContextManager[Any] = nullcontext()


class SuperBatchSpan:
    """A span that is not a block: it may begin in one thread and end in another, and its children name it explicitly.

    This base class records nothing; the one that records is `_otel.OtelSuperBatchSpan`.
    """

    def child(self, name: str) -> AbstractContextManager[Any]:  # noqa: ARG002 - records nothing
        """Record the block as a child; it does not become the active span, since the block is the caller's own code."""
        return NOTHING

    def call(self, name: str) -> AbstractContextManager[Any]:  # noqa: ARG002 - records nothing
        """Record the block, which makes a call, as a child and as the active span."""
        return NOTHING

    def waited(self, name: str) -> None:
        """Record the time since the last child ended as a child."""

    def ending(self, outcome: str) -> AbstractContextManager[Any]:  # noqa: ARG002 - records nothing
        """End the span with the block: with that outcome, or as `failed` if the block raises."""
        return NOTHING

    def chosen_by_fallback(self, fallback: str, reason: str) -> None:
        """Record which fallback decided, and why."""

    def end(self, outcome: str, error: BaseException | None = None) -> None:
        """End the span, unless it has ended already."""


NO_SPAN = SuperBatchSpan()
