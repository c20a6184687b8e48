"""A pytest plugin that ends every run, whatever its tests do, and names the tests that were running.

Three limits, from the inside out:

1. `timeout` (pytest-timeout) fails a test by an exception in the main thread; the run continues with the next test.
2. A test that does not return to Python, or that hangs again in its teardown, loses its process `--timeout-grace`
   seconds later. faulthandler does this from a thread that does not need the GIL; xdist then reports the test by name.
3. `--run-timeout` limits the whole run. The run is also given an end soon after a worker died, because xdist starts no
   other (`--max-worker-restart=0`: its replacements can wait for work that never comes).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time

import psutil
import pytest

AFTER_CRASH_S = 60.0
"""How long the other workers may still run once one has died."""
_STOP_S = 30.0
"""How long the run may take to report once its workers have been ended."""


def pytest_addoption(parser):
    group = parser.getgroup("time limits")
    group.addoption(
        "--run-timeout", type=float, default=1500.0, metavar="SECONDS", help="End the whole run after SECONDS."
    )
    group.addoption(
        "--timeout-grace",
        type=float,
        default=15.0,
        metavar="SECONDS",
        help="Kill the process of a test that is still running SECONDS after its timeout.",
    )


def pytest_configure(config):
    stderr = os.fdopen(os.dup(2), "w")  # capturing does not replace this one
    config.add_cleanup(stderr.close)
    config.pluginmanager.register(TestLimit(config, stderr), "test_limit")
    if not hasattr(config, "workerinput"):  # not in a worker of xdist, but in what controls them
        config.pluginmanager.register(RunLimit(config, stderr), "run_limit")


class TestLimit:
    """Kills this process when a test is still running after its timeout and the grace period."""

    def __init__(self, config, stderr):
        self._grace_s = config.getoption("timeout_grace")
        self._debugging = config.getoption("usepdb")
        self._stderr = stderr
        self._deadline = None

    @pytest.hookimpl(wrapper=True)
    def pytest_timeout_set_timer(self, settings):
        self._deadline = time.monotonic() + settings.timeout + self._grace_s
        self._arm()
        return (yield)

    @pytest.hookimpl(trylast=True)
    def pytest_exception_interact(self):
        self._arm()  # pytest has just disarmed faulthandler's only timer, and the teardown is still to come

    def pytest_runtest_logfinish(self):
        self._deadline = None
        faulthandler.cancel_dump_traceback_later()

    def _arm(self):
        if self._deadline is not None and not self._debugging:
            left_s = max(self._deadline - time.monotonic(), 1.0)
            faulthandler.dump_traceback_later(left_s, exit=True, file=self._stderr)


class RunLimit:
    """Ends the workers when the run's deadline has passed, and the run itself if it does not end then."""

    def __init__(self, config, stderr):
        limit_s = config.getoption("run_timeout")
        self._distributed = bool(config.getoption("numprocesses", None))
        self._stderr = stderr
        self._deadline = time.monotonic() + limit_s
        self._reason = f"the run took longer than {limit_s:g} s (--run-timeout)"
        self._running = {}
        self._problems = []
        self._over = threading.Event()

    def pytest_sessionstart(self):
        threading.Thread(target=self._watch, name="run limit", daemon=True).start()

    def pytest_runtest_logstart(self, nodeid):
        self._running[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid):
        self._running.pop(nodeid, None)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem):
        self._running.pop(crashitem, None)
        self._report(f"a worker died while it ran {crashitem}")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error):
        if error and not self._problems:
            self._report(f"worker {node.gateway.id} died: {error}")
            self._reason = f"the run was still going {AFTER_CRASH_S:g} s after a worker had died"
            self._deadline = min(self._deadline, time.monotonic() + AFTER_CRASH_S)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if self._problems and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for problem in self._problems:
            terminalreporter.write_line(f"ERROR {problem}", red=True)

    def pytest_unconfigure(self):
        self._over.set()

    def _watch(self):
        while time.monotonic() < self._deadline:
            if self._over.wait(0.2):
                return
        running = [f"{test} ({time.monotonic() - since:.0f} s)" for test, since in self._running.copy().items()]
        self._report(f"{self._reason}; running: {', '.join(running) or 'no test'}")
        if self._distributed:
            for worker in psutil.Process().children():
                worker.send_signal(signal.SIGABRT)  # faulthandler prints the stacks of all its threads
                self._over.wait(1)  # one at a time: xdist would give a dead one's tests to another dead one
            if self._over.wait(_STOP_S):
                return
            self._report("the test runner did not end after its workers had")
        faulthandler.dump_traceback(self._stderr)
        for process in psutil.Process().children(recursive=True):
            process.kill()
        os._exit(1)

    def _report(self, problem):
        self._problems.append(problem)
        self._stderr.write(f"\n{problem}\n")
        self._stderr.flush()
