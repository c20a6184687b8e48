"""A span for each request to the API, after ``Guard`` let it in: strangers write nothing into anybody's traces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jest_server.control.guard import API
from jest_wire import tracing

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Traced:
    """ASGI middleware. Probes of health come every second and tell nothing: they have no spans."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or not scope["path"].startswith(f"{API}/"):
            await self._app(scope, receive, send)
            return
        header = tracing.HEADER.encode()
        parent = next((value.decode("latin-1") for name, value in scope["headers"] if name.lower() == header), "")
        with tracing.span("control", parent=parent, kind="server") as span:

            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    # Only now it is known which route it was.
                    method, route = scope["method"], getattr(scope.get("route"), "path", "none")
                    span.update_name(f"{method} {route}")
                    span.set_attributes(
                        {
                            "http.request.method": method,
                            "http.route": route,
                            "http.response.status_code": message["status"],
                        }
                    )
                await send(message)

            await self._app(scope, receive, watched)
