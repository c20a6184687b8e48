"""A real Prometheus: what is on PATH, or else Debian's package, unpacked beside the other tools."""

from __future__ import annotations

import json
import shutil
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from common import ROOT, TOOLS, expect, unpack_debian

from jest_server.local.process import LOOPBACK, ServerProcess, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = ROOT / "deploy" / "observability" / "rules"
START_TIMEOUT_S = 30.0
STOP_GRACE_S = 10.0


def tool(name: str) -> str:
    """Returns the path of `prometheus` or `promtool`.

    Raises:
        SystemExit: If there is none, and none to be had from apt.
    """
    unpacked = TOOLS / "prometheus"
    found = shutil.which(name) or shutil.which(name, path=unpacked / "usr" / "bin")
    if found is None and shutil.which("apt-get"):
        unpack_debian("prometheus", unpacked)
        found = shutil.which(name, path=unpacked / "usr" / "bin")
    if found is None:
        raise SystemExit(f"{name} is not on PATH, and apt has none: install Prometheus")
    return found


class Prometheus:
    """A running server's API."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, path: str, **params: str) -> Any:
        """Returns the answer's data."""
        query = urllib.parse.urlencode(params)
        with urllib.request.urlopen(f"{self._url}{path}?{query}", timeout=30) as answer:  # noqa: S310 - our own server
            return json.load(answer)["data"]

    def series(self, expr: str, start_s: float, end_s: float, step_s: float = 1.0) -> list[dict[str, Any]]:
        """Returns what an expression was over time: labels and values of each series."""
        found = self.ask("/api/v1/query_range", query=expr, start=str(start_s), end=str(end_s), step=str(step_s))
        return list(found["result"])

    def wait_for_all(self, targets: int) -> None:
        """Returns once every target was scraped.

        Raises:
            SystemExit: If one cannot be.
        """
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while len(self.ask("/api/v1/query", query="up == 1")["result"]) < targets:
            up = self.ask("/api/v1/query", query="up")["result"]
            expect(time.monotonic() < give_up_at, f"not every target answers: {up}")
            time.sleep(0.2)

    def ready(self) -> bool:
        """Whether it answers; raises an ``OSError`` if not."""
        with urllib.request.urlopen(f"{self._url}/-/ready", timeout=1):  # noqa: S310 - our own server
            return True


@contextmanager
def running(targets: dict[str, str], folder: Path) -> Iterator[Prometheus]:
    """Runs a server that scrapes ``HOST:PORT`` of each job every second, with the project's rules."""
    port = free_port()
    server, process = Prometheus(f"http://{LOOPBACK}:{port}"), ServerProcess("prometheus", folder / "prometheus.log")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [f"{RULES}/*.yaml"],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [address]}]} for job, address in targets.items()
        ],
    }
    file = folder / "prometheus.yml"
    file.write_text(json.dumps(config))  # JSON is YAML
    command = [
        tool("prometheus"),
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'series'}",
        f"--web.listen-address={LOOPBACK}:{port}",
    ]
    process.start(command, ready=server.ready, timeout_s=START_TIMEOUT_S)
    try:
        yield server
    finally:
        process.stop(STOP_GRACE_S)
