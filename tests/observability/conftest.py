"""The files that describe what is watched."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OBSERVABILITY = ROOT / "deploy" / "observability"


@pytest.fixture(scope="session")
def dashboards():
    """Every dashboard by its file's name."""
    return {file.name: json.loads(file.read_text()) for file in sorted((OBSERVABILITY / "dashboards").glob("*.json"))}


@pytest.fixture(scope="session")
def rules():
    """Every recording rule and alert."""
    files = sorted((OBSERVABILITY / "rules").glob("*.yaml"))
    return [rule for file in files for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


@pytest.fixture(scope="session")
def alert_tests():
    """What promtool is asked to try."""
    return yaml.safe_load((ROOT / "tests" / "observability" / "alerts.yaml").read_text())["tests"]


@pytest.fixture(scope="session")
def make_dashboards():
    """The script that makes the dashboards."""
    spec = importlib.util.spec_from_file_location("make_dashboards", OBSERVABILITY / "make_dashboards.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
