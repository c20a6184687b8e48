"""Fixtures that every package's tests share; each starts its real server when the first test asks for it."""

from __future__ import annotations

import os
import shutil

import pytest
from hypothesis import settings

from jest_server.local.triton_server import TritonServer
from support.collector import collector, traced
from support.references import export_tiny_reference
from support.servers import NO_REDIS, QUEUE_KINDS, queue_server_of, triton_on
from support.stack import reference_towers, stack, stack_repository

__all__ = [
    "collector",
    "queue_server",
    "reference_repository",
    "reference_towers",
    "stack",
    "stack_repository",
    "traced",
    "triton",
]

pytest_plugins = ["support.time_limits"]

# A busy machine is slow, and that is not what these tests are about.
settings.register_profile("no_clock", deadline=None)
settings.load_profile("no_clock")

NEED_REDIS = "need redis-server"
"""The outcome of tests that are skipped for want of it: a count in the last line, not a line for each of them."""


def pytest_configure():
    if os.environ.get("REQUIRE_REDIS_SERVER") and shutil.which("redis-server") is None:
        raise pytest.UsageError(f"REQUIRE_REDIS_SERVER is set, but {NO_REDIS}")


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report):
    return (NEED_REDIS, "s", "SKIPPED") if report.skipped and NO_REDIS in str(report.longrepr) else None


def pytest_terminal_summary(terminalreporter):
    count = len(terminalreporter.stats.get(NEED_REDIS, []))
    if count:
        terminalreporter.write_line(f"{count} tests {NEED_REDIS} and did not run: {NO_REDIS}", yellow=True)


@pytest.fixture(scope="session", params=QUEUE_KINDS)
def queue_server(request, tmp_path_factory):
    """URL of a fresh Redis-like server, of every kind; tests share it, so they use their own keys."""
    with queue_server_of(request.param, tmp_path_factory.mktemp(request.param)) as server:
        yield server.url


@pytest.fixture(scope="session")
def reference_repository(tmp_path_factory):
    """Model repository of the tiny reference model; tests only read it."""
    destination = tmp_path_factory.mktemp("reference") / "repository"
    export_tiny_reference(destination)
    return destination


@pytest.fixture(scope="session")
def triton(reference_repository, tmp_path_factory):
    """Triton serving ``reference_repository``: ``grpc_url``, ``kill()``, ``restart()``; a test that kills restarts."""
    problem = TritonServer.available()
    if problem:
        pytest.skip(problem)
    with triton_on(reference_repository, tmp_path_factory.mktemp("triton")) as server:
        yield server
