"""What every request passes before and after: who calls, how often, how much it sends, and how long it took."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from jest_server.control import problems
from jest_server.domain import tenants
from jest_server.domain.errors import JestServerError, TooLarge

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from typing import Any

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from jest_server.runtime.metrics import ControlMetrics
    from jest_server.runtime.security.rate import CallRates
    from jest_server.runtime.security.tokens import Tokens

API: Final = "/v1"
MAX_BODY_BYTES = 64 << 10
_METHODS: Final = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class Guard:
    """ASGI middleware. Health and the description of the API need no token: they tell what is published anyway."""

    def __init__(
        self, app: ASGIApp, *, metrics: ControlMetrics, rates: CallRates, tokens: Tokens | None = None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._rates = rates
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, code = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            if scope["path"].startswith(f"{API}/"):
                self._let_in(_headers(scope))
            body = await _whole_body(receive)
            await self._app(scope, _replayed(body, receive), watched)
        except JestServerError as error:
            self._metrics.refusals.labels(error.reason, error.limit).inc()
            await problems.of(error)(scope, receive, watched)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.duration.labels(method, route, str(code)).observe(time.perf_counter() - started)

    def _let_in(self, headers: dict[str, str]) -> None:
        if self._tokens is not None:
            tenants.enter(self._tokens.tenant_of(headers.get("authorization")))
        self._rates.admit(tenants.current(), now_s=time.monotonic())


def _headers(scope: MutableMapping[str, Any]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


async def _whole_body(receive: Receive) -> bytes:
    """Receives all of a request, as long as it is small: no request of this API needs more.

    Raises:
        TooLarge: As soon as it is more than may be.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return bytes(body)
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise TooLarge(f"the body is more than {MAX_BODY_BYTES} bytes, the limit", field_name="body")
        if not message.get("more_body"):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body once more, then what else may come."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
