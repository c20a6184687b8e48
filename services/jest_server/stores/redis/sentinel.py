"""Redis behind Sentinels: each new connection asks them which server is the primary now.

    redis+sentinel://[user:password@]host:port[,host:port...]/NAME[/db][?options]

NAME is what the Sentinels call the primary; `rediss+sentinel` speaks TLS to it and to them. Options are those of
plain URLs, and `sentinel_username` and `sentinel_password`, for the Sentinels themselves.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff

SCHEMES = ("redis+sentinel", "rediss+sentinel")
_PORT = 26379
_OF_TLS = "ssl_"


class SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the present primary; callers wait for a free one, as in the pool of a single server."""

    async def aclose(self) -> None:
        """Close these connections, and those to the Sentinels."""
        await super().aclose()
        for sentinel in self.sentinel_manager.sentinels:
            await sentinel.aclose()


def sentinel_pool(url: str, *, connect_timeout_s: float, answer_timeout_s: float, **options: Any) -> SentinelPool:
    """Return a pool that connects lazily.

    Args:
        url: As in the module's description.
        connect_timeout_s: Of a connection to the primary or to a Sentinel.
        answer_timeout_s: Of a Sentinel's answer.
        options: Of the pool and of its connections to the primary.

    Raises:
        ValueError: If `url` is not a valid Redis URL; the message does not repeat it.
    """
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    name, _, database = parts.path.strip("/").partition("/")
    query = dict(parse_qsl(parts.query))
    own = {key: query.pop(f"sentinel_{key}", None) for key in ("username", "password")}
    if not name or (database and not database.isdecimal()):
        raise ValueError("the path is not /NAME or /NAME/DATABASE")
    addresses = [_address(host) for host in hosts.split(",")]
    user = f"{credentials}@" if credentials else ""
    plain = f"{parts.scheme.partition('+')[0]}://{user}primary/{database or 0}?{urlencode(query)}"
    primary: dict[str, Any] = {key: value for key, value in parse_url(plain).items() if key not in ("host", "port")}
    encrypted = primary.pop("connection_class", None) is SSLConnection
    sentinel_options: dict[str, Any] = {key: value for key, value in primary.items() if key.startswith(_OF_TLS)}
    sentinel_options |= {key: value for key, value in own.items() if value is not None}
    # A Sentinel that is down is not retried for seconds, as redis-py would: the next one knows as much.
    sentinel_options["retry"] = Retry(NoBackoff(), 0)
    sentinels = Sentinel(  # type: ignore[no-untyped-call]
        addresses,
        sentinel_kwargs=sentinel_options
        | {"ssl": encrypted, "socket_connect_timeout": connect_timeout_s, "socket_timeout": answer_timeout_s},
    )
    return SentinelPool(  # type: ignore[no-untyped-call]
        name,
        sentinels,
        connection_class=SentinelManagedSSLConnection if encrypted else SentinelManagedConnection,
        **(options | primary | {"socket_connect_timeout": connect_timeout_s}),
    )


def _address(host_and_port: str) -> tuple[str, int]:
    parts = urlsplit(f"//{host_and_port}")
    if not parts.hostname:
        raise ValueError("a Sentinel has no host")
    return parts.hostname, parts.port or _PORT
