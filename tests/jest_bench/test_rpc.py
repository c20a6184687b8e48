"""The benchmark of the server's selection, on real processes and a super-batch that is small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from jest_bench import rpc, served
from jest_bench.commands import app
from jest_bench.health import HealthProbe
from jest_bench.ranks import STAGES, Call, RankProcesses

SMALL = rpc.Options(rows=200, width=16, ranks=(1, 2), num_chunks=4, runs=1)


def call_with(positions):
    return Call(positions=positions, total=1.0, encoded=0.1, sent=0.2, stages={}, sent_bytes=0)


def test_a_run_measures_every_number_of_ranks_and_says_what_the_selector_stands_on():
    result = rpc.measure(SMALL, lambda _: None)
    assert result["stands_on"] in ("queue and cache in Valkey", "queue and cache in Redis")
    assert [row["ranks"] for row in result["ranks"]] == [1, 2]
    for row in result["ranks"]:
        assert row["received_bytes"] == 2 * SMALL.rows * SMALL.width * 2
        assert set(row["stages_s"]) == set(STAGES)
        assert row["stages_s"]["compute"] > 0
        assert row["rest_s"] > 0
        assert row["ratio"] == row["rpc_s"] / row["in_process_s"]
        assert row["rpc_s"] > row["encode_s"] + row["send_s"]
        assert len(row["runs"]["rpc_s"]) == len(row["runs"]["in_process_s"]) == SMALL.runs


def test_the_command_prints_a_table_and_writes_what_it_measured(tmp_path):
    file = tmp_path / "rpc.json"
    options = ["--rows", "200", "--width", "8", "--datatype", "BF16", "--ranks", "3", "--runs", "1"]
    done = CliRunner().invoke(app, ["rpc", *options, "--json", str(file)])
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    assert result["ranks"][0]["ranks"] == 3
    assert rpc.tables(result) in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--datatype", "INT64"], "datatype is 'INT64', expected one of FP32, FP16, BF16"),
        (["--ranks", "2,0"], "ranks is (2, 0), expected numbers of at least 1"),
        (["--ranks", "two"], "invalid literal for int"),
        (["--rows", "60"], "expected at least num_chunks (16)"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_starts(options, message):
    done = CliRunner().invoke(app, ["rpc", *options], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 2
    assert message in done.output


def test_as_many_rows_are_chosen_as_all_numbers_of_ranks_share_evenly():
    assert rpc.Options(rows=8192, ranks=(1, 2, 8)).sub_batch_size == 1632
    assert rpc.Options(rows=8192, ranks=(1,)).sub_batch_size == 1638


def test_selections_of_the_same_rows_pass_whatever_rank_they_are_on():
    rpc._require_same([7, 0, 3], [call_with((3, 0)), call_with((2,))], 10)


def test_a_server_that_chooses_other_rows_is_not_timed():
    with pytest.raises(RuntimeError, match="2 are among the 3 chosen in process: times of different selections"):
        rpc._require_same([7, 0, 3], [call_with((3, 0)), call_with((1,))], 10)


def test_a_rank_that_fails_is_named_with_the_servers_reason():
    problem = rpc.problem(SMALL)
    with (
        served.selector(problem.info(), problem.cached()) as selector,
        RankProcesses(problem.ranks(selector.address, "nobody-made-this", 2)) as processes,
        pytest.raises(RuntimeError, match=r"super-batch 'first' failed: .*rank 1: .*nobody-made-this"),
    ):
        processes.select("first")


def test_a_rank_process_that_was_killed_is_named_and_the_others_do_not_wait_for_it():
    problem = rpc.problem(SMALL)
    with RankProcesses(problem.ranks("127.0.0.1:1", "job", 2)) as processes:
        processes._processes[1].kill()
        processes._processes[1].join()
        with pytest.raises(RuntimeError, match=r"super-batch 'first' failed: rank 0: .*rank 1: its process ended"):
            processes.select("first")


class BusyHealth(health_pb2_grpc.HealthServicer):
    """Says SERVING, but not while it is busy."""

    def __init__(self):
        self.asked, self.free = threading.Event(), threading.Event()
        self.free.set()

    def Check(self, request, context):  # noqa: ARG002 - gRPC calls it so
        if not self.free.is_set():
            self.asked.set()
        assert self.free.wait(30)
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@pytest.fixture
def health_server():
    """A server, its servicer and its address; a test may stop it."""
    servicer, server = BusyHealth(), grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield server, servicer, f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_the_worst_latency_is_how_long_a_busy_server_lets_wait(health_server):
    _, servicer, address = health_server
    with HealthProbe(address) as probe:
        servicer.free.clear()
        assert servicer.asked.wait(30)
        assert not threading.Event().wait(0.3)  # what is measured is time
        servicer.free.set()
    assert probe.worst_s >= 0.3
    assert max(probe.oversleeps_s) < 0.3, "the server's slowness is not the machine's"


def test_a_server_that_goes_away_is_an_error_and_not_a_good_latency(health_server):
    server, _, address = health_server
    probe = HealthProbe(address)
    probe.__enter__()
    server.stop(None).wait()
    probe._thread.join(30)
    with pytest.raises(grpc.RpcError):
        probe.__exit__(None)


@pytest.mark.parametrize("module", ["jest_server.cli.app", "jest_bench.ranks", "jest_bench.health"])
def test_torch_is_not_loaded_for(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
