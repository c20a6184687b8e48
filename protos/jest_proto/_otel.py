"""The only file that imports OpenTelemetry; ``tracing`` does, once somebody turns tracing on."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_trace_id: ContextVar[int | None] = ContextVar("jest_trace_id", default=None)
_propagator = TraceContextTextMapPropagator()
_KINDS = {
    "internal": trace.SpanKind.INTERNAL,
    "server": trace.SpanKind.SERVER,
    "client": trace.SpanKind.CLIENT,
    "consumer": trace.SpanKind.CONSUMER,
}


class _Ids(RandomIdGenerator):
    """Gives a trace the id that was asked for, if one was."""

    def generate_trace_id(self) -> int:
        return _trace_id.get() or super().generate_trace_id()


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


class OtelTracer:
    """What ``tracing`` asks for, done by OpenTelemetry. Its provider is our own: a trainer may have another."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("jest")

    @contextmanager
    def span(self, name: str, attributes: Mapping[str, Any], parent: str | None, kind: str) -> Iterator[Any]:
        """Records a span; see ``tracing``."""
        context = None if parent is None else _propagator.extract({"traceparent": parent}, Context())
        with self._tracer.start_as_current_span(name, context, _KINDS[kind], attributes) as span:
            yield span

    @contextmanager
    def root_span(self, name: str, attributes: Mapping[str, Any], trace_id: int | None) -> Iterator[Any]:
        """Records a span without a parent, in the trace of that id."""
        token = _trace_id.set(trace_id)
        try:
            span = self._tracer.start_span(name, Context(), trace.SpanKind.CLIENT, attributes)
        finally:
            _trace_id.reset(token)
        with trace.use_span(span, end_on_exit=True):
            yield span

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

    def stop(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def make_tracer(service: str) -> OtelTracer:
    """Makes the tracer of a process called ``service``, unless OTEL_SERVICE_NAME names it."""
    once = _Once()
    for name in ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk._shared_internal"):
        logging.getLogger(name).addFilter(once)
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))
    provider = TracerProvider(resource=resource, id_generator=_Ids())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OtelTracer(provider)
