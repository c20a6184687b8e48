"""A collector of traces: OTLP's own service on a real port, which keeps what it is sent. And others, which do not."""

from __future__ import annotations

import socket
import threading
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from jest_wire import tracing
from support.polling import wait_until

STATUS = ("unset", "ok", "error")


@dataclass(frozen=True)
class Received:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict
    start_s: float
    end_s: float
    status: str
    message: str


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens from construction to ``close``."""

    def __init__(self):
        self._lock = threading.Lock()
        self._spans = []
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(self, request, context):  # noqa: ARG002 - gRPC gives it
        with self._lock:
            for resource in request.resource_spans:
                names = {a.key: a.value.string_value for a in resource.resource.attributes}
                self._spans += [
                    Received(
                        names["service.name"],
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        {a.key: a.value.string_value or a.value.int_value for a in span.attributes},
                        span.start_time_unix_nano / 1e9,
                        span.end_time_unix_nano / 1e9,
                        STATUS[span.status.code],
                        span.status.message,
                    )
                    for scope in resource.scope_spans
                    for span in scope.spans
                ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self):
        with self._lock:
            return list(self._spans)

    def named(self, name, **about):
        """Spans of a name, about a ``job`` or whatever else they say."""
        return [
            s
            for s in self.spans()
            if s.name == name and about.items() <= {k[5:]: v for k, v in s.attributes.items()}.items()
        ]

    def wait_for(self, name, **about):
        """The only span of that kind, once it is here."""
        wait_until(lambda: self.named(name, **about))
        (span,) = self.named(name, **about)
        return span

    def children(self, parent):
        """Names of a span's children in order of time."""
        own = [s for s in self.spans() if (s.trace_id, s.parent_id) == (parent.trace_id, parent.span_id)]
        return [s.name for s in sorted(own, key=lambda s: s.start_s)]

    def close(self):
        self._server.stop(0).wait()


class _Silent(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes what it is sent and never says so."""

    def __init__(self):
        self.closing = threading.Event()

    def Export(self, request, context):  # noqa: ARG002 - gRPC gives it
        self.closing.wait()
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def no_collector(kind):
    """Port of a collector that is no use: ``absent``, ``silent`` on its socket, or ``stuck`` in its calls."""
    if kind == "stuck":
        stuck = _Silent()
        server = grpc.server(futures.ThreadPoolExecutor(8))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(stuck, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield port
        finally:
            stuck.closing.set()
            server.stop(0).wait()
        return
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        port = listening.getsockname()[1]
        if kind == "absent":
            listening.close()
        yield port  # the kernel accepts for it


@pytest.fixture
def traced(monkeypatch):
    """Makes environments in which this process and its children send spans to a port."""

    def turn_on(port, *, timeout_s=2):
        monkeypatch.setenv("JEST_TRACING", "1")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(timeout_s))
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")

    yield turn_on
    tracing.stop()


@pytest.fixture
def collector(traced):
    """A collector that works, to which this process and its children send."""
    collector = Collector()
    traced(collector.port)
    yield collector
    tracing.stop()
    collector.close()
