"""Spans for whoever turned tracing on; for all others a check and nothing more: OpenTelemetry is not even imported.

Server and trainer share it because they share the traces: the id of a trace comes from the names of the job and the
super-batch, so that all ranks, calls and retries meet in one, without telling each other.

What a span is about is passed as plain arguments, never as a name or a mapping that was put together for it: where
tracing is off, nobody makes one.
"""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING, Any

from jest_wire.spans import NO_SPAN, NOTHING, SuperBatchSpan

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

HEADER = "traceparent"
STOP_S = 3.0
"""How long the end of a process may wait for a collector that takes its time."""
_tracer: Any = None


def on() -> bool:
    """Tells whether spans are recorded in this process."""
    return _tracer is not None


def start(service: str) -> None:
    """Turns tracing on for this process; the standard OTEL_* variables say where spans go, and which are kept.

    A process that forks keeps its tracing to itself; its child may start its own.

    Raises:
        ValueError: If OpenTelemetry is not installed.
    """
    global _tracer  # noqa: PLW0603 - one process, one tracer
    if _tracer is not None and _tracer.is_ours():
        return
    try:
        from jest_wire._otel import make_tracer  # noqa: PLC0415 - only who traces pays for the import
    except ModuleNotFoundError as error:
        raise ValueError(
            f"JEST_TRACING is set, but {error.name} is not installed: pip install 'jest-server[tracing]'"
        ) from error
    _tracer = make_tracer(service)
    atexit.register(stop)


def stop() -> None:
    """Ends spans that are held, sends what is still to be sent, for ``STOP_S`` at most, and turns tracing off."""
    global _tracer
    if _tracer is not None:
        tracer, _tracer = _tracer, None
        tracer.stop(STOP_S)


def span(
    name: str,
    *,
    job: str = "",
    super_batch_id: str = "",
    parent: str | None = None,
    kind: str = "internal",
    since_s: float | None = None,
) -> AbstractContextManager[Any]:
    """Records the block as a span: the active one's child, or, with ``parent``, that of another process's span.

    ``parent`` is a W3C traceparent; an empty or unreadable one begins a new trace. ``since_s`` (seconds since 1970) is
    when it began, if that was before the block.
    """
    return NOTHING if _tracer is None else _tracer.span(name, (job, super_batch_id, None), parent, kind, since_s)


def super_batch_span(name: str, job: str, super_batch_id: str, rank: int) -> SuperBatchSpan:
    """Begin a root span in the trace of a super-batch; the caller has to end it."""
    return NO_SPAN if _tracer is None else _tracer.super_batch_span(name, (job, super_batch_id, rank))


def call_span(
    method: str, job: str, super_batch_id: str, rank: int | None, under: SuperBatchSpan = NO_SPAN
) -> AbstractContextManager[Any]:
    """Records a trainer's call: under the span that is held, else as a root of its own, in its super-batch's trace."""
    if _tracer is None:
        return NOTHING
    if under is not NO_SPAN:
        return under.call(f"sdk.{method}")
    return _tracer.root_span(f"sdk.{method}", (job, super_batch_id, rank))  # type: ignore[no-any-return]


def about(job: str, super_batch_id: str, rank: int) -> None:
    """Says what the active span is about."""
    if _tracer is not None:
        _tracer.about(job, super_batch_id, rank)


def traceparent() -> str:
    """Returns the active span's W3C traceparent; empty if there is none."""
    return "" if _tracer is None else _tracer.traceparent()


def ids() -> tuple[str, str] | None:
    """Returns the active span's trace and span id in hexadecimal; None if there is none."""
    return None if _tracer is None else _tracer.ids()
