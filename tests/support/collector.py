"""A collector of traces: OTLP's own service on a real port, which keeps what it is sent."""

from __future__ import annotations

import threading
from concurrent import futures
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Received:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict


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
                    )
                    for scope in resource.scope_spans
                    for span in scope.spans
                ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self):
        with self._lock:
            return list(self._spans)

    def close(self):
        self._server.stop(0).wait()
