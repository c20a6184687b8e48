"""Spans for whoever turned tracing on; for all others a check and nothing more: OpenTelemetry is not even imported.

Server and trainer share it because they share the traces: the id of a trace comes from the names of the job and the
super-batch, so that all ranks, calls and retries meet in one, without telling each other.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

HEADER = "traceparent"
_OFF: AbstractContextManager[Any] = nullcontext()
_tracer: Any = None


def on() -> bool:
    """Tells whether spans are recorded in this process."""
    return _tracer is not None


def start(service: str) -> None:
    """Turns tracing on for this process; the standard OTEL_* variables say where spans go, and which are kept.

    Raises:
        ValueError: If OpenTelemetry is not installed.
    """
    global _tracer  # noqa: PLW0603 - one process, one tracer
    if _tracer is not None:
        return
    try:
        from jest_proto._otel import make_tracer  # noqa: PLC0415 - only who traces pays for the import
    except ModuleNotFoundError as error:
        raise ValueError(
            f"JEST_TRACING is set, but {error.name} is not installed: pip install 'jest-server[tracing]'"
        ) from error
    _tracer = make_tracer(service)


def stop() -> None:
    """Sends what is still to be sent, and turns tracing off."""
    global _tracer
    if _tracer is not None:
        tracer, _tracer = _tracer, None
        tracer.stop()


def span(
    name: str, attributes: Mapping[str, Any] | None = None, *, parent: str | None = None, kind: str = "internal"
) -> AbstractContextManager[Any]:
    """Records the block as a span: the active one's child, or, with ``parent``, that of another process's span.

    ``parent`` is a W3C traceparent; an empty or unreadable one begins a new trace.
    """
    return _OFF if _tracer is None else _tracer.span(name, attributes or {}, parent, kind)


def call_span(name: str, job: str, super_batch_id: str, rank: int | None) -> AbstractContextManager[Any]:
    """Records a trainer's call, in the trace of its super-batch if it is about one."""
    if _tracer is None:
        return _OFF
    trace_id = xxhash.xxh3_128_intdigest(f"{job}/{super_batch_id}".encode()) if super_batch_id else None
    attributes = {"jest.job": job, "jest.super_batch": super_batch_id, "jest.rank": 0 if rank is None else rank}
    return _tracer.root_span(name, attributes, trace_id)  # type: ignore[no-any-return]


def traceparent() -> str:
    """Returns the active span's W3C traceparent; empty if there is none."""
    return "" if _tracer is None else _tracer.traceparent()


def ids() -> tuple[str, str] | None:
    """Returns the active span's trace and span id in hexadecimal; None if there is none."""
    return None if _tracer is None else _tracer.ids()
