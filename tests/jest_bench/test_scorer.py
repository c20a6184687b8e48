"""`python -m jest_bench scorer`, on so few examples that only the counts mean something."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from jest_bench.commands import app
from jest_server.local.triton_server import TritonServer

SMALL = ["--examples", "256", "--rows", "64", "--jobs", "1,3", "--apart", "3", "--runs", "1"]


@pytest.mark.skipif(TritonServer.available() is not None, reason=str(TritonServer.available()))
def test_jobs_that_share_cost_one_inference_for_each_example_and_jobs_apart_one_each(stack_repository, tmp_path):
    file = tmp_path / "result.json"
    options = ["scorer", "--model-repository", str(stack_repository), *SMALL, "--json", str(file)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    assert [(row["jobs"], row["inferences"]) for row in result["shared"]] == [(1, 256), (3, 256)]
    assert [(row["jobs"], row["inferences"]) for row in result["apart"]] == [(3, 768)]
    assert result["killed"]["inferences"] >= 256
    assert set(result["cached"]["seconds"]) == {"mget", "cache", "joined"}
    assert result["throughput"]["ratio"] > 0
    assert "| 3 | 256 | 1.000 |" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "1,x"], "invalid literal"),
        (["--jobs", "0"], "jobs is (0,), expected numbers of at least 1"),
        (["--examples", "100", "--rows", "64"], "examples (100) is no multiple of rows (64)"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message, tmp_path):
    done = CliRunner().invoke(app, ["scorer", "--model-repository", str(tmp_path), *options])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
