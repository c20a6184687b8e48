"""The life of a process with a gRPC port: start, serve until told to stop, drain, end.

Health is answered for the whole server (""), for each service, and for whether the process itself works ("liveness");
reflection lists the services.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jest_proto import tracing
from jest_server import errors
from jest_server.logs import get_logger
from jest_server.security import tenants
from jest_server.security.rate import CallRates
from jest_server.security.tokens import Tokens
from jest_server.security.transport import require_safe, server_credentials, tls_files

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from jest_server.metrics import RpcMetrics
    from jest_server.settings import ProcessSettings

ERROR_DOMAIN = "jest.v1"
LIVENESS = "liveness"
"""The service to ask for where the answer decides about a restart."""
SWITCH_INTERVAL_S = 0.001
"""How long a thread may run Python code before one that answers gets its turn; the default is five times that."""
_DETAILS_KEY = "grpc-status-details-bin"
_log = get_logger()


def status_of(error: errors.JestServerError) -> status_pb2.Status:
    """Renders an error as google.rpc.Status with ErrorInfo and, where they apply, BadRequest and RetryInfo."""
    message = tenants.in_their_words(error.message)
    status = status_pb2.Status(code=getattr(code_pb2, error.code.name), message=message)
    metadata = {key: tenants.in_their_words(value) for key, value in error.metadata.items()}
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata)]
    if isinstance(error, errors.InvalidField):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field_name, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
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
            except Exception:  # noqa: BLE001 - the last line of defence: logged here, told to the caller as INTERNAL
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


class Health:
    """The answers to health checks (``grpc.health.v1``), and a port for them alone.

    Every service, and "" for the whole, is SERVING while calls can be answered. ``LIVENESS`` is SERVING from start to
    drain, whatever becomes of Redis and Triton: what it cannot help, a restart does not help either.
    """

    def __init__(self) -> None:
        self._servicer = health.aio.HealthServicer()
        self._services: list[str] = []
        self._probed: grpc.aio.Server | None = None

    def serve_on(self, server: grpc.aio.Server) -> None:
        """Answers on a server's own port, too."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def start(self, services: Sequence[str], listen: str) -> int:
        """Says NOT_SERVING for every service; opens ``listen``, unless it is empty and returns its port."""
        self._services = ["", *services]
        await self.set_ready(ready=False)
        await self._servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        if not listen:
            return 0
        self._probed = grpc.aio.server()
        self.serve_on(self._probed)
        port = self._probed.add_insecure_port(listen)
        await self._probed.start()
        return port

    async def set_ready(self, *, ready: bool) -> None:
        """Tells health checkers whether calls can be answered now."""
        status = health_pb2.HealthCheckResponse
        for service in self._services:
            await self._servicer.set(service, status.SERVING if ready else status.NOT_SERVING)

    async def drain(self) -> None:
        """Says NOT_SERVING for good."""
        await self._servicer.enter_graceful_shutdown()

    async def close(self) -> None:
        """Closes the port."""
        if self._probed is not None:
            await self._probed.stop(0)


class GrpcServer:
    """A gRPC server with health and reflection, not serving before ``ready`` is called.

    Health and reflection ask for no token: they tell what the published contract tells, and whether it works now.

    Args:
        settings: Where to listen, and what protects it.
        metrics: Counts of calls.
        max_message_bytes: Limit of one message.

    Raises:
        ValueError: If the settings would let strangers in, or name files that cannot be used.
    """

    def __init__(self, settings: ProcessSettings, metrics: RpcMetrics, *, max_message_bytes: int = 4 << 20) -> None:
        self._settings = settings
        self._tls = tls_files(settings)
        require_safe(settings, self._tls)
        tokens = None if settings.tokens_file is None else Tokens(settings.tokens_file)
        self.rates = CallRates(settings)
        self._health = Health()
        self.server = grpc.aio.server(
            interceptors=[ErrorInterceptor(metrics, self.rates, tokens)],
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ],
        )
        self._health.serve_on(self.server)

    async def start(self, services: Sequence[str]) -> int:
        """Opens the port, says NOT_SERVING for every service, and returns the port's number."""
        await self._health.start(services, self._settings.health_listen)
        reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), self.server)
        if self._tls is None:
            port = self.server.add_insecure_port(self._settings.listen)
        else:
            port = self.server.add_secure_port(self._settings.listen, server_credentials(self._tls))
        await self.server.start()
        return port

    async def set_ready(self, *, ready: bool) -> None:
        """Tells health checkers whether calls can be answered now."""
        await self._health.set_ready(ready=ready)

    async def drain(self) -> None:
        """Says NOT_SERVING, waits for load balancers to notice, lets calls in hand finish, and closes the port."""
        await self._health.drain()
        await asyncio.sleep(self._settings.drain_delay_s)
        await self.server.stop(self._settings.grace_s)
        await self._health.close()


def answer_first() -> None:
    """Sets the interpreter up so that threads at work and the garbage collector hold answers up as little as possible.

    To be called once, when everything is imported: those objects stay for good, and looking through all of them again
    and again took the collector a tenth of a second.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()


def stop_on_signals() -> asyncio.Event:
    """Returns an event that the first SIGTERM or SIGINT sets; to be called inside the running loop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


@asynccontextmanager
async def background(*jobs: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Runs each job until the block ends; a job that ends or fails before that brings the whole block down."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_endless(job)) for job in jobs]
        yield
        for task in tasks:
            task.cancel()


async def _endless(job: Callable[[], Awaitable[None]]) -> None:
    await job()
    raise RuntimeError(f"{job!r} ended, expected to run until cancelled")


async def every(interval_s: float | Callable[[], float], action: Callable[[], Awaitable[None]], *, name: str) -> None:
    """Repeats an action for ever; a failure is logged and the next turn tries again."""
    while True:
        try:
            await action()
        except errors.JestServerError as error:
            _log.warning("periodic action failed", action=name, message=error.message)
        await asyncio.sleep(interval_s() if callable(interval_s) else interval_s)
