"""Who is let in, how often, and with how much; and what is counted of it."""

from __future__ import annotations

import pytest

from jest_server.control.guard import MAX_BODY_BYTES
from jest_server.runtime.security.rate import CallRates
from jest_server.runtime.security.tokens import Tokens, add_token
from jest_server.runtime.settings import ControlSettings
from support.super_batches import dead_letter, spec, submit

SPEC = {"name": "mine", "policy": {"scoring": "uniform", "sub_batch_size": 4, "num_chunks": 1}}


@pytest.fixture
def tokens(control, tmp_path):
    """Tokens of two tenants."""
    file = tmp_path / "tokens.json"
    made = {tenant: add_token(file, tenant, tenant, expires_at=None) for tenant in ("red", "blue")}
    control.options["tokens"] = Tokens(file)
    return made


def bearer(token):
    return {"authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "TOKEN_MISSING"),
        (bearer("guessed"), "TOKEN_INVALID"),
        ({"authorization": "Basic eA=="}, "TOKEN_INVALID"),
    ],
)
async def test_without_a_valid_token_nothing_is_told(control, tokens, headers, reason):
    async with control.client() as client:
        for path in ("/v1/jobs", "/v1/nothing", "/v1/jobs/job/decisions/x"):
            answer = await client.get(path, headers=headers)
            assert (answer.status_code, answer.json()["reason"]) == (401, reason)
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_health_and_the_description_need_none(control, tokens):
    async with control.client() as client:
        for path in ("/healthz", "/readyz", "/openapi.json"):
            assert (await client.get(path)).status_code == 200


async def test_tenants_have_job_names_of_their_own(control, tokens):
    async with control.client() as client:
        for seed, tenant in enumerate(tokens):
            answer = await client.post("/v1/jobs", json=SPEC | {"seed": seed}, headers=bearer(tokens[tenant]))
            assert answer.status_code == 201
            assert answer.json()["spec"]["name"] == "mine"
            listed = (await client.get("/v1/jobs", headers=bearer(tokens[tenant]))).json()["jobs"]
            assert [(job["spec"]["name"], job["spec"]["seed"]) for job in listed] == [("mine", seed)]
    assert {job.spec.name for job in await control.stores.jobs.list_jobs(after="", limit=9)} >= {
        "red~mine",
        "blue~mine",
    }


async def test_another_tenants_job_is_not_found_whatever_is_asked_of_it(control, tokens):
    await control.stores.jobs.create_job(spec("red~secret"), now_s=1.0)
    await submit(control.stores, "red~secret")
    await control.stores.decisions.dead_letter(dead_letter("red~secret"))
    headers = bearer(tokens["blue"])
    async with control.client() as client:
        for name in ("secret", "nothing"):
            for method, path in (
                ("GET", f"/v1/jobs/{name}"),
                ("DELETE", f"/v1/jobs/{name}"),
                ("GET", f"/v1/jobs/{name}/decisions"),
                ("GET", f"/v1/jobs/{name}/dead-letters"),
                ("GET", f"/v1/jobs/{name}/dead-letters/sb"),
                ("DELETE", f"/v1/jobs/{name}/dead-letters/sb"),
                ("POST", f"/v1/jobs/{name}/dead-letters/sb/requeue"),
            ):
                answer = await client.request(method, path, headers=headers)
                assert (answer.status_code, answer.json()["reason"]) == (404, "JOB_UNKNOWN")
                assert "~" not in answer.text
        assert (await client.get("/v1/jobs/red~secret", headers=headers)).status_code == 400
        own = await client.get("/v1/jobs/secret/dead-letters/sb", headers=bearer(tokens["red"]))
        assert own.json()["job"] == "secret"


async def test_more_calls_than_a_tenant_may_make_are_told_when_to_come_back(control, tokens):
    control.options["rates"] = CallRates(ControlSettings(max_calls_per_s_per_tenant=1))
    async with control.client() as client:
        answers = [await client.get("/v1/queue", headers=bearer(tokens["red"])) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert (answers[2].json()["reason"], answers[2].headers["retry-after"]) == ("RATE_LIMITED", "1")
        assert (await client.get("/v1/queue", headers=bearer(tokens["blue"]))).status_code == 200
    refused = {"reason": "RATE_LIMITED", "limit": "JEST_MAX_CALLS_PER_S_PER_TENANT"}
    assert control.registry.get_sample_value("jest_http_refusals_total", refused) == 1


async def test_more_jobs_than_a_tenant_may_have_are_refused(control, tokens):
    control.jobs._max_jobs_per_tenant = 2
    async with control.client() as client:
        for name, status in (("a", 201), ("b", 201), ("c", 429), ("a", 200)):
            answer = await client.post("/v1/jobs", json=SPEC | {"name": name}, headers=bearer(tokens["red"]))
            assert answer.status_code == status
        assert (
            "there are 2 jobs, the limit"
            in (await client.post("/v1/jobs", json=SPEC | {"name": "c"}, headers=bearer(tokens["red"]))).json()[
                "detail"
            ]
        )
        answer = await client.post("/v1/jobs", json=SPEC, headers=bearer(tokens["blue"]))
        assert answer.status_code == 201


async def test_a_body_beyond_the_limit_is_refused(client):
    answer = await client.post("/v1/jobs", content=b" " * (MAX_BODY_BYTES + 1))
    assert (answer.status_code, answer.json()["reason"]) == (413, "TOO_LARGE")
    assert f"more than {MAX_BODY_BYTES} bytes" in answer.json()["detail"]


async def test_requests_are_counted_by_route_and_not_by_path(client, control):
    for path in ("/v1/jobs/a", "/v1/jobs/b", "/v1/nothing", "/v1/else"):
        await client.get(path)
    await client.request("BREW", "/v1/queue")
    samples = [s for family in control.registry.collect() for s in family.samples if s.name.endswith("_count")]
    counted = {(s.labels["method"], s.labels["route"], s.labels["code"]): s.value for s in samples}
    assert counted[("GET", "/v1/jobs/{name}", "404")] == 2
    assert sum(counted.values()) == 5
    assert {method for method, _, _ in counted} == {"GET", "OTHER"}
    assert {route for _, route, _ in counted} <= {"/v1/jobs/{name}", "/v1/queue", "none"}
