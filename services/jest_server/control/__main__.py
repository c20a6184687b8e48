"""Wires the REST service: `python -m jest_server.control`, configured by the environment (see settings)."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import CollectorRegistry

from jest_server.control.app import create_app
from jest_server.control.guard import Guard
from jest_server.control.traced import Traced
from jest_server.domain.errors import JestServerError
from jest_server.runtime import logs, metrics
from jest_server.runtime.health import Health
from jest_server.runtime.lifecycle import every, stop_on_signals
from jest_server.runtime.security.rate import CallRates
from jest_server.runtime.security.tokens import Tokens
from jest_server.runtime.security.transport import TlsFiles, require_safe, tls_files
from jest_server.runtime.settings import ControlSettings
from jest_server.stores.redis.embedding_cache import RedisEmbeddingCache
from jest_server.stores.redis.stores import open_redis_stores
from jest_server.use_cases.jobs import JobRegistry
from jest_wire import tracing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jest_server.domain.ports import EmbeddingCache, StoreConnection, Stores

SERVICE = "jest.control"
"""Under which name it answers gRPC health checks; what it serves, it serves over HTTP."""
WATCH_S = 1.0
RENEW_S = 1.0
"""How often TLS files are looked at for changes."""
_log = logs.get_logger()


class _Server(uvicorn.Server):
    """Leaves signals to this process' own drain."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


async def serve(settings: ControlSettings, stores: Stores, cache: EmbeddingCache, stop: asyncio.Event) -> None:
    """Runs the service on the given stores until ``stop`` is set, then drains.

    Raises:
        ValueError: If the settings would let strangers in, or name files that cannot be used.
    """
    tls = tls_files(settings)
    require_safe(settings, tls)
    registry = CollectorRegistry()
    tokens = None if settings.tokens_file is None else Tokens(settings.tokens_file)
    jobs = JobRegistry(
        stores.jobs, max_world_size=settings.max_world_size, max_jobs_per_tenant=settings.max_jobs_per_tenant
    )
    app = create_app(stores, cache, jobs, needs_token=tokens is not None, stopping=stop.is_set)
    traced = Traced(app) if settings.tracing else app
    guarded = Guard(traced, metrics=metrics.ControlMetrics(registry), rates=CallRates(settings), tokens=tokens)
    config = uvicorn.Config(guarded, log_config=None, access_log=False, server_header=False, lifespan="off")
    config.timeout_graceful_shutdown = round(settings.grace_s)
    config.load()
    config.ssl = None if tls is None else _ssl_context(tls)
    server = _Server(config)
    listening = _listen(settings.listen)
    metrics_port = metrics.expose(registry, settings.metrics_listen)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    health = Health()
    await health.start((SERVICE,), settings.health_listen)
    watching = asyncio.create_task(_watch(stores.connection, cache, health))
    _log.info("control listens", port=listening.getsockname()[1], metrics_port=metrics_port)
    renewing = asyncio.create_task(_renew(tls, config.ssl)) if tls is not None and config.ssl is not None else None
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not serving.done():
        _log.info("control drains")
        await health.drain()
        await asyncio.sleep(settings.drain_delay_s)
        server.should_exit = True
    await serving
    if renewing is not None:
        renewing.cancel()
    watching.cancel()
    await health.close()
    await stores.connection.close()
    await cache.close()
    _log.info("control stopped")


def main(settings: ControlSettings | None = None) -> None:
    """Runs the service on Redis."""
    settings = settings or ControlSettings()
    logs.configure(process="control", log_format=settings.log_format, level=settings.log_level)
    if settings.tracing:
        tracing.start("jest-control")

    async def run() -> None:
        stores = open_redis_stores(settings.queue_url)
        cache = RedisEmbeddingCache.from_settings(settings)
        await serve(settings, stores, cache, stop_on_signals())

    asyncio.run(run())
    tracing.stop()


async def _watch(connection: StoreConnection, cache: EmbeddingCache, health: Health) -> None:
    async def look() -> None:
        try:
            await connection.ping()
            await cache.ping()
        except JestServerError:
            await health.set_ready(ready=False)
            raise
        await health.set_ready(ready=True)

    await every(WATCH_S, look, name="watch")


def _listen(listen: str) -> socket.socket:
    """Opens the port.

    Raises:
        OSError: If it cannot be had.
    """
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    listening = socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    # Accepted connections inherit it; without, the body of an answer waits for the acknowledgement of its head.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _ssl_context(files: TlsFiles) -> ssl.SSLContext:
    """TLS as for gRPC.

    Raises:
        ValueError: If a file cannot be used.
    """
    files.read()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(files.certificate, files.key)
        if files.client_ca is not None:
            context.load_verify_locations(files.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        raise ValueError(f"TLS files {files.certificate}, {files.key} are not usable: {error.reason}") from error
    return context


async def _renew(files: TlsFiles, context: ssl.SSLContext) -> None:
    """Lets new connections see renewed files. A CA that is taken out of its file stays trusted until a restart."""
    current = files.read()
    while True:
        await asyncio.sleep(RENEW_S)
        try:
            found = files.read()
            if found != current:
                _load_again(files, context)
                current = found
        except (ValueError, ssl.SSLError) as error:
            _log.error("TLS files are not usable: the certificate read before stays in use", error=str(error))


def _load_again(files: TlsFiles, context: ssl.SSLContext) -> None:
    context.load_cert_chain(files.certificate, files.key)
    if files.client_ca is not None:
        context.load_verify_locations(files.client_ca)
    _log.info("TLS certificate renewed", certificate=str(files.certificate))


if __name__ == "__main__":
    main()
