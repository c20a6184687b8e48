"""Servers of every kind that tests start, when the process that started them is killed."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

HOLDER = """
import pathlib, sys, time
from jest_bench import rpc
from jest_bench.ranks import RankProcesses
from jest_server.local.stack import Stack

ranks = rpc.problem(rpc.Options(rows=200, width=16, num_chunks=4)).ranks("127.0.0.1:1", "job", 2)
with Stack(pathlib.Path(sys.argv[1])) as stack, RankProcesses(ranks):
    print(stack.stand_ins, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a process to its parent")
def test_no_server_outlives_a_process_that_is_killed(stack_repository):
    command = [sys.executable, "-c", HOLDER, str(stack_repository)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        stand_ins = holder.stdout.readline()
        processes = psutil.Process(holder.pid).children(recursive=True)
        programs = " ".join(word for process in processes for word in process.cmdline())
        holder.kill()
    expected = ["valkey-server", "jest_server.selector", "jest_server.scorer", "jest_server.control", "spawn_main"]
    expected += [] if "Triton" in stand_ins else ["tritonserver", "triton_python_backend_stub"]
    assert [name for name in expected if name not in programs] == []
    assert psutil.wait_procs(processes, timeout=60)[1] == []
