"""How this server talks to Redis: time limits, retries, scripts, and one error for every way of not answering.

A broken connection is replaced and the command sent again, since all commands here may be repeated. One time limit
holds for all of it, waiting for a free connection and retries included.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeAlias

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff

from jest_server.domain.errors import StoreUnavailable
from jest_server.stores.redis.sentinel import SCHEMES, sentinel_pool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio.client import Pipeline

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 5.0
"""Of one step of at most some MiB; longer work is cut into steps."""
RETRY_AFTER_S = 0.5
MAX_CONNECTIONS = 64
"""Of one pool; further callers wait for a free one."""
_RETRIES = 3
_BROKEN = (exceptions.ConnectionError, exceptions.ReadOnlyError)
"""Worth a new connection: after a failover the same address leads to the new primary."""
_NO_ANSWER = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.OutOfMemoryError,
    exceptions.NoPermissionError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
    OSError,
)
Argument: TypeAlias = "str | int | float | list[Any] | dict[str, Any]"
"""Of a script: text, a number, or a list or mapping of these."""
_REFUSALS = ("BUSY", "MISCONF", "NOREPLICAS")
"""Replies of a server that cannot serve at the moment, for which the client library has no class."""


def connect(url: str) -> Redis:
    """Return a client that connects lazily. It sets no limit on answers: that is for `translate_redis_errors`.

    The library's own limit sends through `asyncio.wait_for`, which up to Python 3.11 may swallow a cancellation
    (python/cpython#86296): a task that should end would go on.

    Raises:
        ValueError: If `url` is not a valid Redis URL; the message does not repeat it, since it may hold a password.
    """
    options: dict[str, Any] = {
        "max_connections": MAX_CONNECTIONS,
        "timeout": None,
        "socket_timeout": None,
        "health_check_interval": 15,
        "retry": Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.02), _RETRIES, supported_errors=_BROKEN),
    }
    try:
        if url.partition("://")[0] in SCHEMES:
            pool: BlockingConnectionPool = sentinel_pool(
                url, connect_timeout_s=CONNECT_TIMEOUT_S, answer_timeout_s=CONNECT_TIMEOUT_S, **options
            )
        else:
            pool = BlockingConnectionPool.from_url(url, socket_connect_timeout=CONNECT_TIMEOUT_S, **options)
    except ValueError:
        raise ValueError(
            "not a Redis URL; expected redis://[[user]:password@]host:port/db, or redis+sentinel://...@host:port,"
            "host:port/NAME/db, with special characters percent-encoded"
        ) from None
    return Redis.from_pool(pool)


class Script:
    """`lua/NAME.lua` as a function of keys and named arguments; of several, the first define functions for the last.

    The arguments are the JSON object in ARGV[1]. Its numbers are text, as commands take them: parsed as numbers, large
    ones would be rounded. What is large or binary goes into `payload`, which is ARGV[2], as it is.
    """

    def __init__(self, client: Redis, *names: str) -> None:
        folder = resources.files(__package__).joinpath("lua")
        self._script = client.register_script("".join(folder.joinpath(f"{name}.lua").read_text() for name in names))

    async def __call__(self, *keys: str, payload: bytes | str | None = None, **args: Argument) -> Any:
        """Run the script on the server, which is sent its text if it does not have it."""
        named = json.dumps(_as_text(args))
        return await self._script(keys=keys, args=[named] if payload is None else [named, payload])


def _as_text(value: Argument) -> str | list[Any] | dict[str, Any]:
    if isinstance(value, dict):
        return {name: _as_text(part) for name, part in value.items()}
    return [_as_text(part) for part in value] if isinstance(value, list) else str(value)


async def run(pipe: Pipeline) -> list[Any]:
    """Send what the pipeline holds; raises the first error as it came, without the command the library would quote."""
    answers = await pipe.execute(raise_on_error=False)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


@asynccontextmanager
async def translate_redis_errors(what: str, *, blocking_s: float = 0.0) -> AsyncIterator[None]:
    """Turn every failure of the server to answer, silence beyond the time limit included, into `StoreUnavailable`.

    Args:
        what: "queue" or "cache".
        blocking_s: How long commands may block on purpose, beyond the limit.
    """
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S + blocking_s):
            yield
    except exceptions.ResponseError as error:
        refusal = next((code for code in _REFUSALS if str(error).startswith(code)), None)
        if refusal is None and not isinstance(error, _NO_ANSWER):
            raise
        raise _unavailable(what, refusal or type(error).__name__) from error
    except TimeoutError as error:
        raise _unavailable(what, f"nothing came within {ANSWER_TIMEOUT_S + blocking_s:g} s") from error
    except _NO_ANSWER as error:
        raise _unavailable(what, f"{type(error).__name__}: {error}") from error


def text(value: Any) -> str:
    """Decode what Redis returns for a string."""
    return value.decode() if isinstance(value, bytes) else str(value)


def milliseconds(seconds: float) -> int:
    """Return the nearest lifetime that Redis accepts."""
    return max(1, round(seconds * 1000))


def _unavailable(what: str, why: str) -> StoreUnavailable:
    return StoreUnavailable(f"the {what} does not answer: {why}", retry_after_s=RETRY_AFTER_S)
