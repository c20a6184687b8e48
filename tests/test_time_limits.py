"""Runs of pytest on small files, with the project's own options: each ends, and names the test that it ended for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from support import supervise

ROOT = Path(__file__).parents[1]
OTHER_TESTS = "def test_one(): pass\ndef test_two(): pass\n"
PLUGINS = [
    "xdist.plugin",
    "pytest_timeout",
    "pytest_asyncio.plugin",
    "support.time_limits",
]
"""Those that matter here, which start in half the time; tests/conftest.py loads the last."""


@pytest.fixture
def run(tmp_path):
    """Runs pytest on a file with this text, and beside it on others; returns status, output and seconds."""

    def run(text, *options, processes=2):
        (tmp_path / "test_it.py").write_text(IMPORTS + textwrap.dedent(text))
        for number in range(4):
            (tmp_path / f"test_other_{number}.py").write_text(OTHER_TESTS)
        command = [
            sys.executable,
            "-P",
            supervise.__file__,
            sys.executable,
            "-m",
            "pytest",
            "-c",
            ROOT / "pyproject.toml",
            "--rootdir",
            tmp_path,
        ]
        command += [word for plugin in PLUGINS for word in ("-p", plugin)]
        command += ["-p", "no:cacheprovider", "--numprocesses", str(processes), *options, tmp_path]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE", "PYTEST"))}
        started = time.monotonic()
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=inherited
            | {"PYTHONPATH": str(ROOT / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=80,
            check=False,
        )
        return done.returncode, done.stdout, time.monotonic() - started

    return run


IMPORTS = "import asyncio, collections, itertools, os, re, signal, socket, subprocess, sys, threading, time, pytest\n"
HANGS = """
import grpc

def test_that_sleeps(): time.sleep(300)

def test_that_waits_for_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def test_that_joins_a_thread():
    thread = threading.Thread(target=time.sleep, args=(300,), daemon=True)
    thread.start()
    thread.join()

def test_that_calls_without_a_deadline():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with grpc.insecure_channel(f"127.0.0.1:{silent.getsockname()[1]}") as channel:
            channel.unary_unary("/a/b")(b"", wait_for_ready=True)

async def test_that_waits_in_an_event_loop(): await asyncio.Event().wait()

@pytest.fixture
def slow():
    yield
    time.sleep(300)

def test_that_hangs_in_its_teardown(slow): pass
"""


def test_a_test_that_hangs_fails_and_all_others_run(run):
    status, output, _ = run(HANGS, "--timeout=1")
    assert status == 1
    failed = re.findall(r"^(?:FAILED|ERROR) test_it.py::test_(\w+) - Failed: Timeout \(>1.0s\)", output, re.MULTILINE)
    assert set(failed) == set(re.findall(r"def test_(\w+)", HANGS))
    assert re.fullmatch(r"=+ 5 failed, 9 passed, 1 error in .* =+", output.splitlines()[-1])


DEATHS = {
    "killed": "def test_dies(): os.kill(os.getpid(), signal.SIGKILL)",
    "exits": "def test_dies(): os._exit(0)",
    "holds the GIL": "def test_dies(): collections.deque(itertools.repeat(0), maxlen=0)",
    "hangs again in its teardown": """
        @pytest.fixture
        def slow():
            yield
            time.sleep(300)

        def test_dies(slow): time.sleep(300)
        """,
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_worker_that_dies_fails_the_run_by_the_name_of_its_test(run, death):
    status, output, _ = run(DEATHS[death], "--timeout=2", "--timeout-grace=2")
    assert status != 0
    assert re.search(r"^FAILED test_it.py::test_dies - worker 'gw\d' crashed while running", output, re.MULTILINE)
    assert "a worker died while it ran test_it.py::test_dies" in output
    assert re.search(r"=+ \d failed, .* in .* =+$", output.splitlines()[-1])


def test_a_worker_that_dies_before_any_test_fails_the_run(run):
    status, output, _ = run("import os; os._exit(0)")
    assert status != 0
    assert re.search(r"worker gw\d died: Not properly terminated", output)


def test_a_run_that_takes_too_long_ends_with_the_tests_that_were_running(run):
    status, output, seconds = run("def test_long(): time.sleep(300)", "--run-timeout=15")
    assert status != 0
    assert re.search(r"took longer than 15 s \(--run-timeout\); running: test_it.py::test_long \(\d+ s\)", output)
    assert re.search(r'test_it.py", line \d+ in test_long', output), "the stacks are printed"
    assert re.search(r"^FAILED test_it.py::test_long - worker 'gw\d' crashed", output, re.MULTILINE)
    assert seconds < 60


def test_a_run_that_hangs_before_any_test_ends_too(run):
    status, output, seconds = run("import time; time.sleep(300)", "--run-timeout=3")
    assert status != 0
    assert "took longer than 3 s (--run-timeout); running: no test" in output
    assert seconds < 60


def test_a_run_in_one_process_ends_as_well(run):
    status, output, _ = run("def test_long(): time.sleep(300)", "--run-timeout=8", processes=0)
    assert status == 1
    assert "running: test_it.py::test_long" in output


def test_nothing_that_a_test_started_outlives_a_worker_that_was_killed(run, tmp_path):
    status, output, _ = run(
        """
        def test_dies():
            command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(300)"]
            children = [subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) for _ in range(2)]
            for child in children:
                child.stdout.readline()
            children[0].send_signal(signal.SIGSTOP)
            open("pids", "w").write(" ".join(str(child.pid) for child in children))
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert status == 1
    assert "killed processes that were left: " in output
    assert [pid for pid in (tmp_path / "pids").read_text().split() if psutil.pid_exists(int(pid))] == []
