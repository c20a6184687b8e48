from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripted_server import ScriptedServer

BOUND_S = 10.0
"""Half of the client's deadline, up to which it would wait for an answer."""
REFUSAL = "this client belongs to process"


@pytest.fixture(scope="module")
def told():
    server = ScriptedServer()
    program = Path(__file__).with_name("fork_scenarios.py")
    run = subprocess.run(
        [sys.executable, program, server.address], check=True, timeout=60, stdout=subprocess.PIPE, text=True
    )
    server.stop()
    return json.loads(run.stdout)


def test_a_child_that_inherited_a_used_client_is_refused_at_once(told):
    said, seconds = told["used"]
    assert said.startswith("JestError: GetServerInfo was not made: this client belongs to process")
    assert said.endswith("make a Client in the process that uses it")
    assert seconds < BOUND_S


def test_a_child_may_close_an_inherited_client_without_harm_to_the_parent(told):
    said, seconds = told["closed in the child"]
    assert said == "None"
    assert seconds < BOUND_S
    assert told["parent afterwards"][0] == "1.2.3"


def test_a_child_that_inherited_a_running_loop_is_refused_at_once(told):
    said, seconds = told["running loop"]
    assert said.startswith("JestError: the next super-batch was not made")
    assert seconds < BOUND_S


def test_a_child_may_close_an_inherited_loop(told):
    said, seconds = told["loop closed in the child"]
    assert said == "None"
    assert seconds < BOUND_S


def test_a_client_that_was_not_used_before_the_fork_may_be_used_after_it(told):
    assert told["unused"][0] == "1.2.3"


def test_workers_of_a_data_loader_load_while_the_client_is_in_use(told):
    assert told["workers that load"][0] == str([["k7", "k5"], ["k15", "k13"], ["k23", "k21"]])


def test_workers_of_a_data_loader_load_what_was_chosen_in_every_epoch(told):
    assert told["workers that load what was chosen"][0] == str([[["k7", "k5"], ["k15", "k13"], ["k23", "k21"]]] * 2)


def test_a_data_loader_s_worker_that_uses_an_inherited_client_is_refused_at_once(told):
    said, seconds = told["workers that call"]
    assert said.startswith("JestError: Caught JestError in DataLoader worker process 0.")
    assert REFUSAL in said
    assert seconds < BOUND_S  # starting and ending the worker included
