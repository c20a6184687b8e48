"""What a run says when there is no `redis-server`: one line, or an error where it is required."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ["tests/jest_server/stores/redis/test_sentinel.py", "tests/jest_server/local/test_valkey_server.py"]


@pytest.fixture
def run_without_redis(tmp_path):
    """Runs two files of tests where `redis-server` is not on the PATH; returns status and lines."""

    def run(**environment):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--numprocesses=1", *FILES],
            cwd=ROOT,
            env=os.environ | {"PATH": str(tmp_path), "REQUIRE_REDIS_SERVER": ""} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout.strip().splitlines()

    return run


def test_tests_that_need_redis_are_counted_in_one_line(run_without_redis):
    status, lines = run_without_redis()
    assert status == 0
    (line,) = [line for line in lines[:-1] if "redis-server" in line]
    said = re.fullmatch(r"(\d+) tests need redis-server and did not run: redis-server is not on the PATH", line)
    assert int(said[1]) > len(FILES)
    assert re.fullmatch(rf"=+ .*\d+ passed, .*{said[1]} need redis-server in .* =+", lines[-1])


def test_a_run_that_requires_redis_does_not_start_without_it(run_without_redis):
    status, lines = run_without_redis(REQUIRE_REDIS_SERVER="1")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert lines == ["ERROR: REQUIRE_REDIS_SERVER is set, but redis-server is not on the PATH"]
