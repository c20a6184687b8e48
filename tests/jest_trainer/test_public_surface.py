from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

import jest_core
import jest_trainer


def test_the_package_exports_its_names_and_no_others():
    assert sorted(jest_trainer.__all__) == [
        "Client",
        "Embeddings",
        "ExampleLosses",
        "JestError",
        "Job",
        "PairLosses",
        "Schedule",
        "SelectedBatches",
        "SelectedIndices",
        "SelectionPolicy",
    ]
    assert all(hasattr(jest_trainer, name) for name in jest_trainer.__all__)


def test_the_public_modules_are_these_and_no_others():
    public = sorted(module.name for module in pkgutil.iter_modules(jest_trainer.__path__) if module.name[0] != "_")
    assert public == ["batch_sampler", "client", "errors", "job", "loader", "outputs", "results"]


def test_the_method_s_types_are_the_method_s_own():
    assert jest_trainer.Embeddings is jest_core.Embeddings
    assert jest_trainer.Schedule is jest_core.Schedule
    assert jest_trainer.SelectionPolicy is jest_core.SelectionPolicy


@pytest.fixture(scope="module")
def imported():
    """What importing the SDK did in a fresh process that had torch already."""
    program = (
        "import json, sys, threading, time, numpy, torch, torch.distributed\n"
        "started = time.process_time()\n"
        "import jest_trainer\n"
        "print(json.dumps([time.process_time() - started, threading.active_count(), sorted(sys.modules)]))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    return json.loads(run.stdout)


def test_importing_costs_little_beside_torch(imported):
    assert imported[0] < 1.5


def test_importing_starts_no_thread(imported):
    assert imported[1] == 1


def test_importing_loads_nothing_of_the_server(imported):
    modules = set(imported[2])
    assert not modules & {"jest_server", "pydantic", "redis", "tritonclient", "fastapi", "prometheus_client"}
