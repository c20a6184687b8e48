"""Every error as RFC 9457 ``application/problem+json``, with the same reasons as gRPC's error details."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match

from jest_server.domain import tenants
from jest_server.domain.errors import InvalidField, JestServerError, Unauthenticated
from jest_server.runtime.logs import get_logger

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

MEDIA_TYPE = "application/problem+json"
VALUE_SHOWN = 100
"""Characters of a wrong value that an answer repeats."""

_METHODS = ("DELETE", "GET", "POST")
_log = get_logger()


class Violation(BaseModel):
    """One field that holds a value that cannot be."""

    field: str
    description: str


class Problem(BaseModel):
    """What is wrong, for a program (``reason``, ``metadata``) and for a person (``detail``)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    reason: str
    metadata: dict[str, str] = {}
    violations: list[Violation] = []


def install(app: FastAPI) -> None:
    """Makes the application answer every error as a problem."""
    app.add_exception_handler(JestServerError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


def of(error: JestServerError) -> JSONResponse:
    """Renders one of the server's own errors, in the caller's words."""
    detail = tenants.unscoped_text(error.message)
    violations = [Violation(field=error.field_name, description=detail)] if isinstance(error, InvalidField) else []
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    metadata = {key: tenants.unscoped_text(value) for key, value in error.metadata.items()}
    return _answer(error.http_status, detail, error.reason, headers, metadata, violations)


async def _known(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, JestServerError), "registered for this type alone"
    _log.info("request refused", reason=error.reason, message=error.message)
    return of(error)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError), "registered for this type alone"
    violations = []
    for found in error.errors():
        field = ".".join(str(part) for part in found["loc"][1:])
        value = repr(found.get("input"))[:VALUE_SHOWN]
        violations.append(Violation(field=field, description=f"{field} is {value}: {found['msg']}"))
    detail = "; ".join(violation.description for violation in violations)
    return _answer(InvalidField.http_status, detail, InvalidField.reason, {}, {}, violations)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException), "registered for this type alone"
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_allowed(request))
    reason = HTTPStatus(error.status_code).name
    return _answer(error.status_code, str(error.detail), reason, headers, {}, [])


def _allowed(request: Request) -> list[str]:
    """All methods of the path: the framework tells those of its first route alone."""
    return [
        method
        for method in _METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    _log.error("request failed", method=request.method, path=request.url.path, exc_info=error)
    detail = "the server failed; its log tells why"
    return _answer(JestServerError.http_status, detail, JestServerError.reason, {}, {}, [])


def _answer(
    status: int,
    detail: str,
    reason: str,
    headers: dict[str, str],
    metadata: dict[str, str],
    violations: list[Violation],
) -> JSONResponse:
    problem = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        reason=reason,
        metadata=metadata,
        violations=violations,
    )
    return JSONResponse(problem.model_dump(), status, headers, MEDIA_TYPE)
