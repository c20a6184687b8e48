"""The only file that imports OpenTelemetry; ``tracing`` does, once somebody turns tracing on."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import xxhash
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jest_wire.spans import SuperBatchSpan

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger(__name__)
_trace_id: ContextVar[int | None] = ContextVar("jest_trace_id", default=None)
_propagator = TraceContextTextMapPropagator()
_KINDS = {
    "internal": trace.SpanKind.INTERNAL,
    "server": trace.SpanKind.SERVER,
    "client": trace.SpanKind.CLIENT,
    "consumer": trace.SpanKind.CONSUMER,
}
_CLOSE_S = 1.0
"""How long, after it was told to give up, the exporter may take to do so."""

About = tuple[str, str, int | None]
"""Job, super-batch and rank; empty and None where there is none."""


class _Ids(IdGenerator):
    """Gives a trace the id that was asked for, if one was; all others come from the system.

    The SDK's own come from ``random``, which ranks of one job seed alike: their spans would have the same ids.
    """

    def generate_span_id(self) -> int:
        return secrets.randbits(64) or 1

    def generate_trace_id(self) -> int:
        return _trace_id.get() or secrets.randbits(128) or 1

    def is_trace_id_random(self) -> bool:
        return _trace_id.get() is None


class _Once(logging.Filter):
    """Lets one complaint of the exporter through: a collector that is away for days need not fill the log."""

    def __init__(self) -> None:
        super().__init__()
        self._told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        told, self._told = self._told, True
        return not told


class OtelSuperBatchSpan(SuperBatchSpan):
    """See `SuperBatchSpan`; `open_` holds it until it ends."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span, about: About, open_: set[OtelSuperBatchSpan]) -> None:
        self._tracer = tracer
        self._span = span
        self._about = about
        self._context = trace.set_span_in_context(span, Context())
        self._open = open_
        self._open.add(self)
        self._idle_since_ns = time.time_ns()

    @contextmanager
    def child(self, name: str) -> Iterator[Any]:
        """See there."""
        span = self._start(name)
        try:
            yield span
        except BaseException as error:
            _fail(span, error)
            raise
        finally:
            span.end()
            self._idle_since_ns = time.time_ns()

    @contextmanager
    def call(self, name: str) -> Iterator[Any]:
        """See there."""
        try:
            with trace.use_span(self._start(name, kind=trace.SpanKind.CLIENT), end_on_exit=True) as span:
                yield span
        finally:
            self._idle_since_ns = time.time_ns()

    def waited(self, name: str) -> None:
        """See there."""
        self._start(name, start_time=self._idle_since_ns).end()

    @contextmanager
    def ending(self, outcome: str) -> Iterator[None]:
        """See there."""
        try:
            yield
        except BaseException as error:
            self.end("failed", error)
            raise
        self.end(outcome)

    def chosen_by_fallback(self, fallback: str, reason: str) -> None:
        """See there."""
        self._span.set_attributes({"jest.fallback": fallback, "jest.fallback_reason": reason})

    def end(self, outcome: str, error: BaseException | None = None) -> None:
        """See there."""
        if self not in self._open:
            return
        self._open.discard(self)
        self._span.set_attribute("jest.outcome", outcome)
        if error is not None:
            _fail(self._span, error)
        self._span.end()

    def _start(self, name: str, **options: Any) -> trace.Span:
        return self._tracer.start_span(name, self._context, attributes=_attributes(*self._about), **options)


class OtelTracer:
    """What ``tracing`` asks for, done by OpenTelemetry. Its provider is our own: a trainer may have another."""

    def __init__(self, provider: TracerProvider, exporter: OTLPSpanExporter) -> None:
        self._provider = provider
        self._exporter = exporter
        self._tracer = provider.get_tracer("jest")
        self._process = os.getpid()
        self._open: set[OtelSuperBatchSpan] = set()
        self._stopping = threading.Event()
        # Started now: from Python 3.12 on, a process that ends starts no threads.
        self._stopper = threading.Thread(target=self._send_the_rest, name="tracing-stop", daemon=True)
        self._stopper.start()

    def is_ours(self) -> bool:
        """Tells whether it was made in this process; after a fork its threads and its connection are the parent's."""
        return self._process == os.getpid()

    @contextmanager
    def span(self, name: str, about: About, parent: str | None, kind: str, since_s: float | None) -> Iterator[Any]:
        """Records a span; see ``tracing``."""
        context = None if parent is None else _propagator.extract({"traceparent": parent}, Context())
        # Clocks of two machines differ; a span that begins after its end shows as one that took centuries.
        start_ns = None if since_s is None else min(round(since_s * 1e9), time.time_ns())
        with self._tracer.start_as_current_span(
            name, context, _KINDS[kind], _attributes(*about), start_time=start_ns
        ) as span:
            yield span

    @contextmanager
    def root_span(self, name: str, about: About) -> Iterator[Any]:
        """Records a span without a parent, in the trace of its super-batch if it has one."""
        with trace.use_span(self._root(name, about, trace.SpanKind.CLIENT), end_on_exit=True) as span:
            yield span

    def super_batch_span(self, name: str, about: About) -> OtelSuperBatchSpan:
        """Begin the root span of a super-batch; see `tracing`."""
        return OtelSuperBatchSpan(self._tracer, self._root(name, about, trace.SpanKind.INTERNAL), about, self._open)

    def about(self, *about: Any) -> None:
        """Says what the active span is about."""
        trace.get_current_span().set_attributes(_attributes(*about))

    def traceparent(self) -> str:
        """Returns the active span's."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier)
        return carrier.get("traceparent", "")

    def ids(self) -> tuple[str, str] | None:
        """Returns the active span's."""
        context = trace.get_current_span().get_span_context()
        if not context.is_valid:
            return None
        return trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)

    def stop(self, timeout_s: float) -> None:
        """Ends what is held and sends what is left; what the collector has not taken in time is dropped."""
        if not self.is_ours():
            return
        for span in list(self._open):
            span.end("abandoned")
        self._stopping.set()
        self._stopper.join(timeout_s)
        if self._stopper.is_alive():
            _log.warning("the collector of traces did not take the rest within %g s: it is dropped", timeout_s)
            self._exporter.shutdown(timeout_millis=0)
            self._stopper.join(_CLOSE_S)

    def _send_the_rest(self) -> None:
        """Waits for the end, and does what takes the SDK up to half a minute and cannot be told to take less."""
        self._stopping.wait()
        self._provider.shutdown()

    def _root(self, name: str, about: About, kind: trace.SpanKind) -> trace.Span:
        job, super_batch_id, _ = about
        token = _trace_id.set(xxhash.xxh3_128_intdigest(f"{job}/{super_batch_id}".encode()) if super_batch_id else None)
        try:
            return self._tracer.start_span(name, Context(), kind, _attributes(*about))
        finally:
            _trace_id.reset(token)


def _attributes(job: str, super_batch_id: str, rank: int | None) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {}
    if job:
        attributes["jest.job"] = job
    if super_batch_id:
        attributes["jest.super_batch"] = super_batch_id
    if rank is not None:
        attributes["jest.rank"] = rank
    return attributes


def _fail(span: trace.Span, error: BaseException) -> None:
    span.record_exception(error)
    span.set_status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error}")


def make_tracer(service: str) -> OtelTracer:
    """Makes the tracer of a process called ``service``, unless OTEL_SERVICE_NAME names it."""
    once = _Once()
    for name in ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk._shared_internal"):
        logging.getLogger(name).addFilter(once)
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))
    provider = TracerProvider(resource=resource, id_generator=_Ids(), shutdown_on_exit=False)
    exporter = OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OtelTracer(provider, exporter)
