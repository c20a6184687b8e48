"""Schemathesis asks the running service, on a real Redis, what its own description allows and forbids."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import positive_data_acceptance

from jest_server.control.app import create_app
from jest_server.local.jest_process import JestHttpProcess
from jest_server.runtime.security.tokens import new_token
from jest_server.stores.redis.stores import open_redis_stores
from jest_server.use_cases.jobs import JobRegistry
from support.memory_stores.embedding_cache import MemoryEmbeddingCache
from support.memory_stores.stores import open_memory_stores
from support.servers import queue_server_of
from support.super_batches import REFERENCE, dead_letter, decision, spec, submit

THOROUGH = settings(
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


async def fill(url, prefix=""):
    """Puts something behind every path."""
    stores = open_redis_stores(url)
    await stores.jobs.announce_reference(REFERENCE, ttl_s=3600)
    job = f"{prefix}siglip-base-1"
    await stores.jobs.create_job(spec(job), now_s=1.0)
    for name in ("0-00000017", "decided", "dead"):
        await submit(stores, job, name)
    await stores.decisions.decide(decision(job, "0-00000017"), keep_s=3600)
    await stores.decisions.dead_letter(dead_letter(job, "dead"))
    await stores.connection.close()


@contextmanager
def running(folder, **more):
    with queue_server_of("valkey", folder / "queue") as queue:
        url = f"{queue.url}/0"
        asyncio.run(fill(url, "red~" if more else ""))
        files = {"queue_url": url, "cache_url": f"{queue.url}/1", "drain_delay_s": 0, **more}
        process = JestHttpProcess("control", "jest_server.control", folder / "control.log", files)
        process.start()
        try:
            yield f"http://127.0.0.1:{process.port}"
        finally:
            process.stop()


def described(*, needs_token):
    """What the service says of itself, wherever it runs."""
    stores = open_memory_stores()
    app = create_app(
        stores, MemoryEmbeddingCache(), JobRegistry(stores.jobs, max_world_size=4096), needs_token=needs_token
    )
    return schemathesis.openapi.from_dict(app.openapi())


def validate(case, url):
    # What a policy's fields have to do with each other no JSON schema tells: such specs may be refused.
    excluded = [positive_data_acceptance] if case.operation.label == "POST /v1/jobs" else []
    case.call_and_validate(base_url=url, excluded_checks=excluded)


WITH_TOKENS = described(needs_token=True)
TOKEN, RECORD = new_token("red", "red", expires_at=None)


@WITH_TOKENS.auth()
class Bearer:
    def get(self, case, context):  # noqa: ARG002 - the signature is schemathesis'
        return TOKEN

    def set(self, case, token, context):  # noqa: ARG002 - likewise
        case.headers = {**(case.headers or {}), "Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with running(tmp_path_factory.mktemp("control")) as url:
        yield url


@pytest.fixture(scope="module")
def url_with_tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    (folder / "tokens.json").write_text(f"[{RECORD.model_dump_json()}]")
    with running(folder, tokens_file=folder / "tokens.json") as url:
        yield url


@described(needs_token=False).parametrize()
@THOROUGH
def test_nothing_is_found_without_tokens(case, url):
    validate(case, url)


@WITH_TOKENS.parametrize()
@THOROUGH
def test_nothing_is_found_with_tokens(case, url_with_tokens):
    validate(case, url_with_tokens)
