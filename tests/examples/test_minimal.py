"""The first thing that a newcomer runs, and reads in the README."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jest_server.local.stack import Stack

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "trainer" / "examples"
STEPS = 40
SUPER_BATCH, SUB_BATCH = 160, 32


pytestmark = pytest.mark.timeout(240)  # two trainings and the start of a stack, on a busy machine


def run(*command):
    return subprocess.run(
        [sys.executable, *command], cwd=EXAMPLES, check=True, timeout=100, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the run prints against a real stack that serves its own reference model."""
    folder = tmp_path_factory.mktemp("shapes")
    repository = folder / "model_repository"
    run("minimal_reference.py", "--model-repository", str(repository), "--steps", "120")
    with Stack(repository, data_dir=folder / "stack") as stack:
        return run("-c", f"import minimal; minimal.main({stack.address!r}, steps={STEPS})")


def test_the_run_ends_and_its_accounts_add_up(printed):
    loaded, trained = STEPS * SUPER_BATCH, STEPS * SUB_BATCH
    assert f"trained on {trained:,} of {loaded:,} pairs" in printed
    inferred, cached = re.search(r"embedded ([\d,]+), ([\d,]+) were cached", printed).groups()
    assert 0 < int(inferred.replace(",", "")) <= loaded
    assert 0 < int(cached.replace(",", "")) <= loaded


def test_what_is_chosen_has_the_right_caption_far_more_often_than_what_is_loaded(printed):
    shares = [int(share) for share in re.findall(r"(\d+)% of the captions are right", printed)]
    assert len(shares) == STEPS // 20
    assert sum(shares) / len(shares) > 70


def test_the_first_snippet_of_the_readme_is_cut_from_it():
    lines = (EXAMPLES / "minimal.py").read_text(encoding="utf-8").splitlines(keepends=True)
    begin, end = (next(n for n, line in enumerate(lines) if mark in line) for mark in ("README: from", "README: to"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    assert snippet == "import jest_trainer as jest\n\n" + textwrap.dedent("".join(lines[begin + 1 : end]))
