"""A pytest plugin after whose runs no process is left that a test started, even if the test's worker was killed.

Servers end with the process that started them (`jest_server.local.die_with_parent`). What a test starts in another way,
or stops with SIGSTOP, does not: so every process of a run carries the run's id in its environment, by which the plugin
finds and kills it at the end.
"""

from __future__ import annotations

import os
import uuid

import psutil
import pytest

VARIABLE = "TEST_RUN_IDS"
"""Ids of the run and of those that it is a part of: a test may run pytest."""
_RUN_ID = uuid.uuid4().hex
_EXIT_S = 5.0
"""How long processes that have just been asked to end may take."""


def is_worker(config):
    """Whether this is a worker process of pytest-xdist, not the process that controls the run."""
    return hasattr(config, "workerinput")


def pytest_configure(config):
    if not is_worker(config):
        os.environ[VARIABLE] = f"{os.environ.get(VARIABLE, '')} {_RUN_ID}"
        config.pluginmanager.register(_AtEnd())


class _AtEnd:
    def __init__(self):
        self._killed = []

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self):
        result = yield  # xdist ends its workers
        self._killed = kill_leftover_processes()
        return result

    def pytest_terminal_summary(self, terminalreporter):
        if self._killed:
            terminalreporter.write_line(f"killed processes that tests had left: {'; '.join(self._killed)}")


def processes_with(run_id):
    """Return all processes but this one that carry the id, zombies excepted."""
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and _has(process, run_id)]


def kill_leftover_processes():
    """Kill what is left of this run, and return the command lines."""
    _, left = psutil.wait_procs(processes_with(_RUN_ID), timeout=_EXIT_S)
    killed = []
    for process in left:
        try:
            killed.append(" ".join(process.cmdline()))
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=_EXIT_S)
    return killed


def _has(process, run_id):
    try:
        return process.status() != psutil.STATUS_ZOMBIE and run_id in process.environ().get(VARIABLE, "")
    except psutil.Error:
        return False
