from __future__ import annotations

import subprocess
import sys

import jest_core
import jest_trainer


def test_the_package_exports_its_six_names_and_no_others():
    assert sorted(jest_trainer.__all__) == [
        "Client",
        "Embeddings",
        "JestError",
        "Job",
        "SelectedBatches",
        "SelectionPolicy",
    ]
    assert all(hasattr(jest_trainer, name) for name in jest_trainer.__all__)


def test_the_method_s_types_are_the_method_s_own():
    assert jest_trainer.Embeddings is jest_core.Embeddings
    assert jest_trainer.SelectionPolicy is jest_core.SelectionPolicy


def run(program):
    return subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True
    ).stdout.strip()


def test_importing_starts_no_thread_and_loads_nothing_of_the_server():
    program = (
        "import sys, threading, jest_trainer\n"
        "heavy = {'jest_server', 'pydantic', 'redis', 'tritonclient', 'fastapi', 'prometheus_client'}\n"
        "print(sorted(heavy & set(sys.modules)), threading.active_count())\n"
    )
    assert run(program) == "[] 1"


def test_importing_costs_little_beside_torch():
    program = (
        "import time, torch, numpy, torch.distributed\n"
        "started = time.process_time()\n"
        "import jest_trainer\n"
        "print(time.process_time() - started)\n"
    )
    assert float(run(program)) < 1.5
