"""What the REST service answers, path by path."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jest_server.domain.errors import StoreUnavailable
from jest_server.domain.super_batches import SuperBatchRef
from support.super_batches import REFERENCE, dead_letter, decision, result_of, spec, submit, upload

SPEC = {"name": "new", "reference_model": "ref", "policy": {"filter_ratio": "0.8", "num_chunks": 4}}


async def problem(call, status, reason):
    """The problem that a request is answered with."""
    answer = await call
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert (answer.status_code, found["status"], found["reason"]) == (status, status, reason), found
    return found


# Jobs


async def test_a_job_is_registered_once_and_the_same_spec_again_changes_nothing(client, control):
    first, again = [await client.post("/v1/jobs", json=SPEC) for _ in range(2)]
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert first.json()["reference"]["version"] == "1"
    assert (await control.stores.jobs.get_job("new")).spec.policy.filter_ratio == "0.8"


async def test_the_name_of_another_spec_is_a_conflict(client):
    await client.post("/v1/jobs", json=SPEC)
    found = await problem(client.post("/v1/jobs", json=SPEC | {"seed": 1}), 409, "JOB_CONFLICT")
    assert "exists with seed = 0, this call has 1" in found["detail"]
    assert found["metadata"] == {"job": "new", "field": "seed"}


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"name": "a b"}, "name", "String should match pattern"),
        ({"name": "other~job"}, "name", "String should match pattern"),
        ({"seed": "7"}, "seed", "seed is '7': Input should be a valid integer"),
        ({"world_size": 0}, "world_size", "greater than or equal to 1"),
        ({"world_size": 65}, "spec.world_size", "spec.world_size is 65, the limit is 64"),
        ({"weight": 0}, "weight", "greater than or equal to 0.001"),
        ({"colour": 1}, "colour", "Extra inputs are not permitted"),
        ({"policy": {"filter_ratio": "2"}}, "spec.policy", "filter_ratio"),
        ({"policy": {"num_chunks": 0, "sub_batch_size": 1}}, "policy.num_chunks", "greater than or equal to 1"),
        ({"reference_model": ""}, "spec.reference_model", "expected a name"),
    ],
)
async def test_a_spec_that_cannot_be_names_field_value_and_expectation(client, control, change, field, says):
    found = await problem(client.post("/v1/jobs", json=SPEC | change), 400, "INVALID_FIELD")
    assert [violation["field"] for violation in found["violations"]] == [field]
    assert says in found["detail"]
    assert await control.stores.jobs.get_job("new") is None


@pytest.mark.parametrize("body", ["", "{", "[" * 10_000, '{"a":' * 5_000, "null", '"text"', "\x00"])
async def test_a_body_that_is_no_spec_is_refused(client, body):
    answer = client.post("/v1/jobs", content=body, headers={"content-type": "application/json"})
    await problem(answer, 400, "INVALID_FIELD")


async def test_a_model_that_nobody_serves_tells_when_to_come_back(client):
    answer = await client.post("/v1/jobs", json=SPEC | {"reference_model": "other"})
    assert answer.headers["retry-after"] == "2"
    assert answer.json()["reason"] == "REFERENCE_UNAVAILABLE"


async def test_pages_of_jobs_together_name_every_job_once(client, control):
    for name in ("a", "b", "c"):
        await control.stores.jobs.create_job(spec(name), now_s=1.0)
    names, after = [], ""
    while after is not None:
        page = (await client.get("/v1/jobs", params={"limit": 2, "after": after})).json()
        names += [job["spec"]["name"] for job in page["jobs"]]
        after = page["next_after"]
    assert names == ["a", "b", "c", "job"]


async def test_a_job_tells_its_accounts(client, control):
    await submit(control.stores, "job")
    found = (await client.get("/v1/jobs/job")).json()
    assert (found["counters"]["submitted"], found["counters"]["in_flight"]) == (1, 1)
    assert found["reference"]["name"] == "ref"


async def test_a_deleted_job_is_gone(client):
    assert (await client.delete("/v1/jobs/job")).status_code == 204
    await problem(client.get("/v1/jobs/job"), 404, "JOB_UNKNOWN")
    await problem(client.delete("/v1/jobs/job"), 404, "JOB_UNKNOWN")


# Decisions


async def test_decisions_are_listed_without_positions_and_told_whole_one_by_one(client, control):
    for number in range(3):
        await submit(control.stores, "job", f"sb-{number}")
        await control.stores.decisions.decide(decision("job", f"sb-{number}"), keep_s=60 + number)
    first = (await client.get("/v1/jobs/job/decisions", params={"limit": 2})).json()
    last = (await client.get("/v1/jobs/job/decisions", params={"limit": 2, "before": first["next_before"]})).json()
    assert [d["super_batch_id"] for page in (first, last) for d in page["decisions"]] == ["sb-2", "sb-1", "sb-0"]
    assert last["next_before"] is None
    assert "positions" not in first["decisions"][0]
    assert first["decisions"][0]["reference_version"] == "1"
    assert (await client.get("/v1/jobs/job/decisions/sb-1")).json()["positions"] == {"0": [1, 0]}
    await problem(client.get("/v1/jobs/job/decisions/none"), 404, "SUPER_BATCH_UNKNOWN")


# Dead letters


async def dead(control, name="sb"):
    await submit(control.stores, "job", name)
    await control.stores.decisions.dead_letter(dead_letter("job", name))


async def test_dead_letters_are_listed_looked_at_and_dropped(client, control):
    await dead(control)
    (listed,) = (await client.get("/v1/jobs/job/dead-letters")).json()["dead_letters"]
    assert listed == (await client.get("/v1/jobs/job/dead-letters/sb")).json()
    assert (listed["job"], listed["reason"], listed["detail"]) == ("job", "R", "why")
    assert (await client.delete("/v1/jobs/job/dead-letters/sb")).status_code == 204
    for call in (client.get, client.delete):
        await problem(call("/v1/jobs/job/dead-letters/sb"), 404, "DEAD_LETTER_UNKNOWN")


async def test_a_requeued_dead_letter_is_in_flight_for_the_model_as_it_is_served_now(client, control):
    await dead(control)
    newer = REFERENCE.model_copy(update={"version": "2"})
    await control.stores.jobs.announce_reference(newer, ttl_s=60)
    answer = (await client.post("/v1/jobs/job/dead-letters/sb/requeue")).json()
    assert (answer["super_batch_id"], answer["reference_version"]) == ("sb", "2")
    assert (await control.stores.super_batches.get_super_batch(SuperBatchRef("job", "sb"))).reference == newer
    await problem(client.post("/v1/jobs/job/dead-letters/sb/requeue"), 404, "DEAD_LETTER_UNKNOWN")


async def test_a_dead_letter_that_cannot_be_requeued_says_why(client, control):
    await dead(control)
    for number in range(2):
        await submit(control.stores, "job", f"sb-{number}")
    found = await problem(client.post("/v1/jobs/job/dead-letters/sb/requeue"), 429, "QUEUE_FULL")
    assert "reach the limit of 2 (max_in_flight)" in found["detail"]
    assert found["metadata"]["limit"] == "max_in_flight"
    control.stores.connection.jobs["job"].kept_inputs.clear()
    await problem(client.post("/v1/jobs/job/dead-letters/sb/requeue"), 409, "NOT_KEPT")


# State


async def test_references_tell_which_version_new_super_batches_get(client, control):
    await control.stores.jobs.announce_reference(REFERENCE.model_copy(update={"version": "2"}), ttl_s=60)
    found = (await client.get("/v1/references")).json()["references"]
    assert [(r["reference"]["version"], r["served"], r["current"]) for r in found] == [
        ("2", True, True),
        ("1", True, False),
    ]


async def test_the_queue_tells_its_depth_age_and_lines(client, control):
    assert (await client.get("/v1/queue")).json() == {"shards": 0, "oldest_age_s": 0.0, "queues": []}
    await submit(control.stores, "job")
    await upload(control.stores, "job", shards=3)
    (claim,) = await control.stores.queue.claim("c", REFERENCE, count=1, block_s=0)
    found = (await client.get("/v1/queue")).json()
    assert found["shards"] == 3
    assert found["queues"] == [{"model": "ref", "version": "1", "waiting": {"job": 2}, "scoring": 1}]
    await control.stores.queue.complete(claim, result_of(claim))
    assert (await client.get("/v1/queue")).json()["shards"] == 2


async def test_the_cache_tells_how_full_it_is(client, control):
    await control.cache.put(REFERENCE, {"a": bytes(REFERENCE.value_bytes)})
    found = (await client.get("/v1/cache")).json()
    assert (found["values"], found["used_bytes"]) == (1, REFERENCE.value_bytes)


# Errors and health


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/jobs?limit=0", "limit"),
        ("/v1/jobs?limit=many", "limit"),
        ("/v1/jobs?after=%20", "after"),
        ("/v1/jobs?befor=x", "befor"),
        ("/v1/queue?limit=1", "limit"),
        ("/v1/jobs/a~b", "name"),
        ("/v1/jobs/job/decisions/a%2Fb%20", None),
        ("/v1/jobs/job/decisions?before=x", "before"),
        ("/v1/jobs/job/decisions?limit=101", "limit"),
    ],
)
async def test_parameters_that_cannot_be_are_named(client, path, field):
    answer = await client.get(path)
    found = answer.json()
    if field is None:
        assert answer.status_code == 404
    else:
        assert (answer.status_code, found["reason"]) == (400, "INVALID_FIELD")
        assert [violation["field"] for violation in found["violations"]] == [field]


async def test_unknown_paths_and_methods_are_problems_too(client):
    await problem(client.get("/v1/nothing"), 404, "NOT_FOUND")
    await problem(client.get("/nothing"), 404, "NOT_FOUND")
    answer = await client.put("/v1/queue")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
    assert answer.json()["reason"] == "METHOD_NOT_ALLOWED"


async def test_a_store_that_is_away_is_told(client, control, monkeypatch):
    async def away():
        raise StoreUnavailable("the queue does not answer", retry_after_s=0.5)

    monkeypatch.setattr(control.stores.connection, "ping", away)
    monkeypatch.setattr(control.stores.queue, "depth", away)
    for path in ("/readyz", "/v1/queue"):
        answer = await client.get(path)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["reason"] == "STORE_UNAVAILABLE"
    assert (await client.get("/healthz")).json() == {"status": "ok"}


async def test_who_is_about_to_end_is_alive_and_not_ready(client, control):
    assert (await client.get("/readyz")).status_code == 200
    control.is_stopping = True
    await problem(client.get("/readyz"), 503, "STOPPING")
    assert (await client.get("/healthz")).status_code == 200


async def test_a_fault_of_ours_tells_nothing_of_it(client, control, monkeypatch):
    async def fault():
        raise RuntimeError("secret")

    monkeypatch.setattr(control.stores.queue, "queue_states", fault)
    found = await problem(client.get("/v1/queue"), 500, "INTERNAL")
    assert "secret" not in str(found)


async def test_the_description_has_every_path_an_example_and_the_form_of_problems(client):
    found = (await client.get("/openapi.json")).json()
    assert len(found["paths"]) == 12
    operations = [operation for path in found["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations) == 15
    assert "422" not in {status for operation in operations for status in operation["responses"]}
    assert "Problem" in found["components"]["schemas"]
    create = found["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]
    answer = await client.post("/v1/jobs", json=create["examples"]["siglip"]["value"] | {"reference_model": "ref"})
    assert answer.status_code == 201


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
sys.modules["tritonclient"] = None
import jest_server.control.__main__
from jest_server.use_cases.jobs import policy_of
from jest_server.domain.policies import PolicySpec
policy_of(PolicySpec(filter_ratio="0.8"))
"""


def test_the_service_needs_neither_torch_nor_triton():
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=True)
