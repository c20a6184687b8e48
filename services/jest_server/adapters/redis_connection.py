"""How this server talks to Redis: time limits, retries, scripts, and one error for every way of not answering."""

from __future__ import annotations

from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff

from jest_server.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from redis.commands.core import AsyncScript

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 10.0
RETRY_AFTER_S = 0.5
_RETRIES = 3
_NO_ANSWER = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.BusyLoadingError,
    exceptions.ReadOnlyError,
    exceptions.OutOfMemoryError,
    exceptions.ClusterDownError,
    OSError,
)


def connect(url: str, *, blocking_s: float = 0.0) -> Redis:
    """Returns a client; ``blocking_s`` is how long its commands may block on purpose."""
    return Redis.from_url(
        url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=ANSWER_TIMEOUT_S + blocking_s,
        health_check_interval=15,
        retry=Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.02), _RETRIES),
    )


def script(client: Redis, name: str) -> AsyncScript:
    """Loads ``lua/NAME.lua``."""
    source = resources.files(__package__).joinpath("lua", f"{name}.lua").read_text()
    return client.register_script(source)


@contextmanager
def answering(what: str) -> Iterator[None]:
    """Turns every way of not answering into StoreUnavailable; ``what`` is "queue" or "cache"."""
    try:
        yield
    except _NO_ANSWER as error:
        raise StoreUnavailable(
            f"the {what} does not answer: {type(error).__name__}: {error}", retry_after_s=RETRY_AFTER_S
        ) from error


def text(value: Any) -> str:
    """Decodes what Redis returns for a string."""
    return value.decode() if isinstance(value, bytes) else str(value)
