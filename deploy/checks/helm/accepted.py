"""The second half of `make helm-test`, run where our own code is installed: does it take what the chart renders?

Each process' settings are read from its rendered environment, and the built-in Redis' rendered configuration and users
are given to a real server, on which queue and cache then work.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
from pathlib import Path
from unittest import mock

from common import TOOLS, expect

from jest_server.domain.errors import StoreUnavailable
from jest_server.domain.jobs import JobSpec
from jest_server.domain.policies import PolicySpec
from jest_server.local.process import LOOPBACK, ServerProcess, free_port
from jest_server.local.valkey_server import executables
from jest_server.runtime.security.transport import require_safe, tls_files
from jest_server.runtime.settings import (
    ControlSettings,
    EmbedSettings,
    ProcessSettings,
    ScorerSettings,
    SelectorSettings,
)
from jest_server.stores.redis.connection import connect
from jest_server.stores.redis.embedding_cache import RedisEmbeddingCache
from jest_server.stores.redis.stores import open_redis_stores
from support.super_batches import REFERENCE

RENDERED = TOOLS / "helm-test/rendered.json"
_SETTINGS = {"selector": SelectorSettings, "scorer": ScorerSettings, "control": ControlSettings}
_VALUE = bytes(range(REFERENCE.value_bytes))


def main() -> None:
    """Reads what check.py has rendered, and tries it."""
    rendered = json.loads(RENDERED.read_text())
    count = 0
    for scenario, processes in rendered["processes"].items():
        for component, environment in processes:
            _settings(scenario, component, environment)
            count += 1
    print(f"{count} environments accepted by the processes' own settings")
    asyncio.run(_redis(rendered["redis"]))
    print("queue and cache work on servers with the built-in Redis' configuration, and on no other's keys")


def _settings(scenario: str, component: str, environment: dict[str, str]) -> None:
    expanded: dict[str, str] = {}
    for name, value in environment.items():
        expanded[name] = re.sub(r"\$\(([A-Z_]+)\)", lambda found: expanded[found[1]], value)
    with mock.patch.dict(os.environ, expanded, clear=True):
        if component == "embed":
            EmbedSettings()
            ScorerSettings()
            return
        settings: ProcessSettings = _SETTINGS[component]()
    require_safe(settings, tls_files(settings))
    for url in (settings.queue_url, settings.cache_url):
        connect(url)
    # Settings for all processes are given to all of them: each must be known to one.
    known = {field for kind in _SETTINGS.values() for field in kind.model_fields}
    unread = [n for n in expanded if n.startswith("JEST_") and n.removeprefix("JEST_").lower() not in known]
    expect(not unread, f"helm-test: {scenario}: no process reads {', '.join(unread)}")


async def _redis(stores: dict[str, dict[str, str]]) -> None:
    servers: list[ServerProcess] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            urls = {name: _start(name, store, Path(folder), servers) for name, store in stores.items()}
            queue, cache = open_redis_stores(urls["queue"]), RedisEmbeddingCache.from_url(urls["cache"])
            spec = JobSpec(name="job", policy=PolicySpec(filter_ratio="0.5"))
            await queue.jobs.create_job(spec, now_s=1.0)
            await cache.put(REFERENCE, {"key": _VALUE})
            kept = (await queue.jobs.get_job("job")).spec == spec and await cache.get(REFERENCE, ["key"]) == [_VALUE]
            expect(kept, "helm-test: the built-in Redis does not give back what was put in")
            await queue.connection.close()
            await cache.close()
            for url in (urls["cache"], re.sub(r"//[^@]*@", "//", urls["queue"])):
                stranger = open_redis_stores(url)
                try:
                    await stranger.jobs.create_job(spec, now_s=1.0)
                except StoreUnavailable:
                    continue
                finally:
                    await stranger.connection.close()
                raise SystemExit(f"helm-test: {url.rpartition('@')[2]} lets strangers in")
        finally:
            for server in servers:
                server.stop(5)


def _start(name: str, store: dict[str, str], folder: Path, servers: list[ServerProcess]) -> str:
    here, port = folder / name, free_port()
    here.mkdir()
    (here / "users.acl").write_text(store["acl"])
    conf = store["conf"].replace("dir /data", f"dir {here}").replace("port 6379", f"port {port}\nbind {LOOPBACK}")
    (here / "redis.conf").write_text(conf.replace("/etc/redis/users/users.acl", str(here / "users.acl")))
    server = ServerProcess(f"redis {name}", here / "log")
    servers.append(server)

    def ready() -> bool:
        return "Ready to accept connections" in (here / "log").read_text()

    server.start([next(iter(executables().values())), here / "redis.conf"], ready=ready, timeout_s=20)
    return re.sub(r"@.*?/", f"@{LOOPBACK}:{port}/", store["url"])


if __name__ == "__main__":
    main()
