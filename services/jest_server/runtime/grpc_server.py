"""A gRPC server with health checks and reflection: start, serve, drain, end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from jest_server.runtime.error_interceptor import ErrorInterceptor
from jest_server.runtime.health import Health
from jest_server.runtime.security.rate import CallRates
from jest_server.runtime.security.tokens import Tokens
from jest_server.runtime.security.transport import require_safe, server_credentials, tls_files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jest_server.runtime.metrics import RpcMetrics
    from jest_server.runtime.settings import ProcessSettings


class GrpcServer:
    """A gRPC server with health and reflection, not serving before ``ready`` is called.

    Health and reflection ask for no token: they report the published contract and whether the server works now.

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
        """Report to health checkers whether calls can be answered now."""
        await self._health.set_ready(ready=ready)

    async def drain(self) -> None:
        """Says NOT_SERVING, waits for load balancers to notice, lets calls in hand finish, and closes the port."""
        await self._health.drain()
        await asyncio.sleep(self._settings.drain_delay_s)
        await self.server.stop(self._settings.grace_s)
        await self._health.close()
