"""Health is answered while a large selection is received and computed: the event loop does none of it."""

from __future__ import annotations

import sys

import pytest

from jest_bench import rpc, served
from jest_bench.health import HealthProbe
from jest_bench.ranks import RankProcesses

LARGE = rpc.Options(rows=8192, width=512, ranks=(1,))


@pytest.fixture(scope="module")
def problem():
    return rpc.problem(LARGE)


@pytest.fixture(scope="module")
def selector(problem):
    with served.selector(problem.info(), problem.cached()) as selector:
        yield selector


def test_health_is_answered_while_a_large_selection_runs(problem, selector, record_property):
    rpc.create_job(selector.address, "large", LARGE, 1)
    with RankProcesses(problem.ranks(selector.address, "large", 1)) as ranks:
        ranks.select("warm-up")
        with HealthProbe(selector.address) as health:
            [call] = ranks.select("measured")
    record_property("selection_s", call.total)
    record_property("worst_health_s", health.worst_s)
    sys.stdout.write(f"{len(health.latencies_s)} checks in {call.total:.3f} s, the worst took {health.worst_s:.3f} s\n")
    # A loop that the selection blocks answers when it is done. Milliseconds are for `bench rpc`, on a quiet machine.
    assert health.worst_s < call.stages["compute"] / 2
