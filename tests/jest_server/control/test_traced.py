"""What a person who opens a trace of the REST service sees."""

from __future__ import annotations

import httpx
import pytest

from jest_server.control.guard import Guard
from jest_server.control.traced import Traced
from jest_server.runtime.metrics import ControlMetrics
from jest_server.runtime.security.tokens import Tokens, add_token
from jest_wire import tracing


@pytest.fixture
async def traced_client(control, collector, tmp_path):
    """A client that is let in, of a service that records spans."""
    tracing.start("jest-control")
    token = add_token(tmp_path / "tokens.json", "red", "red", expires_at=None)
    control.options["tokens"] = Tokens(tmp_path / "tokens.json")
    guarded = Guard(Traced(control.app), metrics=ControlMetrics(control.registry), **control.options)
    transport = httpx.ASGITransport(guarded, raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://control", headers=headers) as client:
        yield client


async def test_a_request_is_a_span_named_by_its_route_under_its_callers(traced_client, collector):
    await traced_client.get("/v1/jobs/mine", headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})
    tracing.stop()
    (span,) = collector.spans()
    assert (span.name, span.service) == ("GET /v1/jobs/{name}", "jest-control")
    assert (span.trace_id, span.parent_id) == ("a" * 32, "b" * 16)
    assert span.attributes == {
        "http.request.method": "GET",
        "http.route": "/v1/jobs/{name}",
        "http.response.status_code": 404,
    }


async def test_neither_probes_nor_strangers_are_in_traces(traced_client, collector):
    assert (await traced_client.get("/healthz")).status_code == 200
    assert (await traced_client.get("/readyz")).status_code == 200
    stranger = {"authorization": "Bearer guessed", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    assert (await traced_client.get("/v1/jobs", headers=stranger)).status_code == 401
    tracing.stop()
    assert collector.spans() == []


async def test_a_failure_nobody_foresaw_is_in_the_trace(traced_client, collector, control, monkeypatch):
    async def fail(**_):
        raise ZeroDivisionError("of a store")

    monkeypatch.setattr(control.stores.jobs, "list_jobs", fail)
    assert (await traced_client.get("/v1/jobs")).status_code == 500
    tracing.stop()
    (span,) = collector.spans()
    assert (span.status, span.message) == ("error", "ZeroDivisionError: of a store")
    assert span.attributes["http.response.status_code"] == 500
