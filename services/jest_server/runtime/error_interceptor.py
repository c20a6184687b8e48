"""Authenticates calls, and turns what a use case raises into a gRPC status with error details."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from jest_server.domain import errors, tenants
from jest_server.runtime.logs import get_logger
from jest_wire import tracing
from jest_wire.values import duration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from jest_server.runtime.metrics import RpcMetrics
    from jest_server.runtime.security.rate import CallRates
    from jest_server.runtime.security.tokens import Tokens

ERROR_DOMAIN = "jest.v1"
_DETAILS_KEY = "grpc-status-details-bin"
_log = get_logger()


def status_of(error: errors.JestServerError) -> status_pb2.Status:
    """Renders an error as google.rpc.Status with ErrorInfo and, where they apply, BadRequest and RetryInfo."""
    message = tenants.unscoped_text(error.message)
    status = status_pb2.Status(code=getattr(code_pb2, error.code.name), message=message)
    metadata = {key: tenants.unscoped_text(value) for key, value in error.metadata.items()}
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata)]
    if isinstance(error, errors.InvalidField):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field_name, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration(error.retry_after_s)))
    for detail in details:
        status.details.add().Pack(detail)
    return status


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Lets in who may call, turns what a use case raises into the call's status, and counts every call."""

    def __init__(self, metrics: RpcMetrics, rates: CallRates, tokens: Tokens | None = None) -> None:
        self._metrics = metrics
        self._rates = rates
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps handlers that give one answer; streams of answers (health, reflection) pass as they are."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or handler.response_streaming or not method.startswith("/jest."):
            return handler
        serializers = {
            "request_deserializer": _reading(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(self._guard(method, handler.stream_unary), **serializers)
        return grpc.unary_unary_rpc_method_handler(self._guard(method, handler.unary_unary), **serializers)

    def _guard(self, method: str, behaviour: Any) -> Any:
        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            started = time.perf_counter()
            code = grpc.StatusCode.OK
            try:
                if self._tokens is not None:
                    tenants.enter(self._tokens.tenant_of(_metadata(context, "authorization")))
                self._rates.admit(tenants.current(), now_s=time.monotonic())
                if not tracing.on():
                    return await behaviour(_readable(request), context)
                with tracing.span(method[1:], parent=_metadata(context, tracing.HEADER) or "", kind="server"):
                    return await behaviour(_readable(request), context)
            except errors.JestServerError as error:
                code = error.code
                self._metrics.refusals.labels(method, error.reason, error.limit).inc()
                _log.info("call refused", method=method, reason=error.reason, message=error.message)
                await _abort(context, error)
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except Exception:  # noqa: BLE001 - the last line of defence: logged here, answered with INTERNAL
                code = grpc.StatusCode.INTERNAL
                _log.exception("call failed", method=method)
                await _abort(context, errors.JestServerError("internal error; the server's log has the details"))
            finally:
                self._metrics.duration.labels(method, code.name).observe(time.perf_counter() - started)

        return guarded


class _Unreadable:
    """Stands for a message that was none; gRPC itself would answer it with nothing but "INTERNAL"."""


def _reading(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def read(message: bytes) -> Any:
        try:
            return deserialize(message)
        except DecodeError:
            return _Unreadable()

    return read


def _readable(request: Any) -> Any:
    """Passes on a request or a stream of them, and refuses what could not be read."""
    if isinstance(request, _Unreadable):
        raise errors.InvalidField(
            "the message cannot be read: it is damaged, nested too deeply, or none of this contract's messages",
            field_name="message",
        )
    return _all_readable(request) if hasattr(request, "__aiter__") else request


async def _all_readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _readable(request)


def _metadata(context: grpc.aio.ServicerContext[Any, Any], name: str) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, str) else value.decode("latin-1")
    return None


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: errors.JestServerError) -> None:
    status = status_of(error)
    details = ((_DETAILS_KEY, status.SerializeToString()),)
    await context.abort(error.code, status.message, trailing_metadata=details)
