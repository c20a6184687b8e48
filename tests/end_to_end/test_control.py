"""The REST service as a process of its own: over the running stack, and with TLS and tokens."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import time
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from conformance.speaker import Speaker, features, fresh_keys, unit_embeddings
from jest_server.domain.dead_letters import DeadLetter
from jest_server.local.jest_process import JestHttpProcess, JestProcess
from jest_server.local.process import ServerStartError
from jest_server.runtime.security.tokens import add_token
from jest_server.stores.redis.stores import open_redis_stores
from support.certificates import make_authority, needs_openssl, sign
from support.polling import wait_until
from support.servers import queue_server_of

pytestmark = needs_openssl

# Over the running stack


@pytest.fixture(scope="module")
def control_process(stack, tmp_path_factory):
    urls = {"queue_url": f"{stack.valkey.url}/0", "cache_url": f"{stack.valkey.url}/1", "drain_delay_s": 0}
    log = tmp_path_factory.mktemp("control") / "control.log"
    process = JestHttpProcess("control", "jest_server.control", log, urls)
    process.start()
    yield process
    process.stop()


@pytest.fixture
def control(control_process):
    with httpx.Client(base_url=f"http://127.0.0.1:{control_process.port}") as client:
        yield client


@pytest.fixture
def speaker(stack):
    speaker = Speaker(stack.address, "jest_reference")
    yield speaker
    speaker.close()


def test_what_was_decided_over_grpc_is_history_over_http(control, speaker):
    job = speaker.create_job()
    answer = speaker.walk(job, "first", fresh_keys(16))
    speaker.walk(job, "second", fresh_keys(16))
    listed = control.get(f"/v1/jobs/{job.spec.name}/decisions").json()["decisions"]
    assert [decision["super_batch_id"] for decision in listed] == ["second", "first"]
    whole = control.get(f"/v1/jobs/{job.spec.name}/decisions/first").json()
    assert whole["positions"]["0"] == list(answer.positions)
    assert control.get(f"/v1/jobs/{job.spec.name}").json()["counters"]["selected"] == 2


def test_a_job_made_over_http_is_served_over_grpc(control, speaker, unique):
    spec = {
        "name": unique("rest"),
        "reference_model": "jest_reference",
        "policy": {"sub_batch_size": 4, "num_chunks": 2},
    }
    created = control.post("/v1/jobs", json=spec)
    assert created.status_code == 201, created.text
    keys = fresh_keys(16)
    assert len(speaker.submit(spec["name"], "sb", keys).missing_positions) == 16
    assert control.delete(f"/v1/jobs/{spec['name']}").status_code == 204


def test_a_dead_letter_is_requeued_and_its_trainer_gets_a_decision(stack, control, speaker):
    job, keys = speaker.create_job(), fresh_keys(16)
    name = job.spec.name
    missing = list(speaker.submit(name, "sb", keys).missing_positions)

    async def write_dead_letter():
        stores = open_redis_stores(f"{stack.valkey.url}/0")
        letter = DeadLetter(job=name, super_batch_id="sb", reason="INFERENCE_FAILED", detail="", at_s=time.time())
        assert await stores.decisions.dead_letter(letter)
        await stores.connection.close()

    asyncio.run(write_dead_letter())
    listed = control.get(f"/v1/jobs/{name}/dead-letters").json()["dead_letters"]
    assert [letter["reason"] for letter in listed] == ["INFERENCE_FAILED"]
    assert control.post(f"/v1/jobs/{name}/dead-letters/sb/requeue").status_code == 200
    assert list(speaker.submit(name, "sb", keys).missing_positions) == missing
    speaker.upload(name, "sb", missing, features(job, keys))
    assert len(speaker.select(name, "sb", unit_embeddings(16, seed=0)).positions) == 4
    counters = control.get(f"/v1/jobs/{name}").json()["counters"]
    assert (counters["submitted"], counters["selected"], counters["dead_lettered"]) == (1, 1, 0)


def test_the_state_of_the_stack_is_told(control, speaker):
    speaker.walk(speaker.create_job(), "sb", fresh_keys(16))
    (reference, *_) = control.get("/v1/references").json()["references"]
    assert (reference["reference"]["name"], reference["served"], reference["current"]) == ("jest_reference", True, True)
    assert control.get("/v1/queue").json()["shards"] == 0
    assert control.get("/v1/cache").json()["values"] >= 16


def test_requests_are_counted_on_a_port_of_their_own(control_process, control):
    control.get("/v1/queue")
    counted = httpx.get(f"http://127.0.0.1:{control_process.metrics_port}/metrics").text
    assert 'jest_http_request_duration_seconds_count{code="200",method="GET",route="/v1/queue"}' in counted
    assert control.get("/metrics").status_code == 404


# With TLS and tokens


class Listening(JestProcess):
    """Ready when its port is open: what is behind it, the test finds out."""

    def _serves(self):
        socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        return True


@pytest.fixture(scope="module")
def queue_url(tmp_path_factory):
    with queue_server_of("valkey", tmp_path_factory.mktemp("queue")) as queue:
        yield queue.url


class Secured:
    def __init__(self, folder, queue_url, **settings):
        self.folder = folder
        self.authority = make_authority(folder)
        self.pair = sign(self.authority, folder, "server")
        self.token = add_token(folder / "tokens.json", "red", "red", expires_at=None)
        yesterday = datetime.now(UTC) - timedelta(days=1)
        self.expired = add_token(folder / "tokens.json", "old", "red", expires_at=yesterday)
        files = {"tls_certificate": self.pair.certificate, "tls_key": self.pair.key}
        urls = {"queue_url": f"{queue_url}/0", "cache_url": f"{queue_url}/1", "drain_delay_s": 0}
        files["tokens_file"] = folder / "tokens.json"
        self.process = Listening("control", "jest_server.control", folder / "control.log", urls | files | settings)

    def client(self, token=None, pair=None):
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        if pair is not None:
            context.load_cert_chain(pair.certificate, pair.key)
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return httpx.Client(base_url=f"https://localhost:{self.process.port}", verify=context, headers=headers)


@pytest.fixture(scope="module")
def secured(queue_url, tmp_path_factory):
    secured = Secured(tmp_path_factory.mktemp("secured"), queue_url)
    secured.process.start()
    yield secured
    secured.process.stop()


def test_who_has_a_token_is_served_over_tls(secured):
    with secured.client(secured.token) as client:
        assert client.get("/v1/jobs").json() == {"jobs": [], "next_after": None}


@pytest.mark.parametrize(
    ("pick", "reason"),
    [
        (lambda _: None, "TOKEN_MISSING"),
        (lambda _: "jest_guessed", "TOKEN_INVALID"),
        (lambda secured: secured.token[:-1], "TOKEN_INVALID"),
        (lambda secured: secured.expired, "TOKEN_EXPIRED"),
    ],
)
def test_who_has_none_that_is_valid_is_refused(secured, pick, reason):
    with secured.client(pick(secured)) as client:
        answer = client.get("/v1/jobs")
    assert (answer.status_code, answer.json()["reason"]) == (401, reason)


def test_plain_text_gets_no_answer_from_a_port_with_tls(secured):
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://127.0.0.1:{secured.process.port}/healthz")


def test_a_certificate_that_nobody_vouches_for_is_the_clients_to_refuse(secured, tmp_path):
    stranger = make_authority(tmp_path)
    context = ssl.create_default_context(cafile=str(stranger.certificate))
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://localhost:{secured.process.port}/healthz", verify=context)


def test_a_renewed_certificate_is_shown_without_a_restart(secured):
    renewed = sign(secured.authority, secured.folder, "renewed")
    secured.pair.key.write_bytes(renewed.key.read_bytes())
    secured.pair.certificate.write_bytes(renewed.certificate.read_bytes())
    shown = renewed.certificate.read_text().split()
    wait_until(lambda: ssl.get_server_certificate(("127.0.0.1", secured.process.port)).split() == shown)
    with secured.client(secured.token) as client:
        assert client.get("/v1/queue").status_code == 200


def test_no_secret_is_in_the_log(secured):
    with secured.client(secured.expired) as client:
        client.get("/v1/jobs")
    log = (secured.folder / "control.log").read_text()
    assert "control listens" in log
    assert not any(secret in log for secret in (secured.token, secured.expired))


def test_with_a_client_ca_nobody_connects_without_a_certificate(queue_url, tmp_path):
    authority = make_authority(tmp_path, "clients")
    secured = Secured(tmp_path, queue_url, tls_client_ca=authority.certificate)
    secured.process.start()
    with secured.client(secured.token, pair=sign(authority, tmp_path, "client")) as client:
        assert client.get("/v1/jobs").status_code == 200
    with secured.client(secured.token) as client, pytest.raises(httpx.TransportError):
        client.get("/v1/jobs")
    secured.process.stop()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"listen": "0.0.0.0:0"}, "JEST_LISTEN is 0.0.0.0:0, which other machines can reach, but there is no TLS"),
        ({"tls_key": "missing.pem"}, "JEST_TLS_CERTIFICATE is not set"),
        ({"tls_key": "missing.pem", "tls_certificate": "missing.pem"}, "missing.pem cannot be read"),
        ({"tokens_file": "missing.json"}, "token file missing.json cannot be read"),
    ],
)
def test_what_would_be_unsafe_or_cannot_be_used_does_not_start(tmp_path, settings, message):
    process = Listening("control", "jest_server.control", tmp_path / "control.log", settings)
    with pytest.raises(ServerStartError, match=message):
        process.start()


def test_a_process_that_is_told_to_end_says_so_and_finishes(queue_url, tmp_path):
    urls = {"queue_url": f"{queue_url}/0", "cache_url": f"{queue_url}/1", "drain_delay_s": 1.5}
    process = JestHttpProcess("control", "jest_server.control", tmp_path / "control.log", urls)
    process.start()
    url = f"http://127.0.0.1:{process.port}"
    os.kill(process.pid, signal.SIGTERM)
    wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 503)
    assert httpx.get(f"{url}/v1/queue").status_code == 200
    wait_until(lambda: not process.alive)
    assert "control stopped" in (tmp_path / "control.log").read_text()
