"""Answers to health checks (`grpc.health.v1`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

LIVENESS = "liveness"
"""The service to ask for where the answer decides about a restart."""


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
        """Report to health checkers whether calls can be answered now."""
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
