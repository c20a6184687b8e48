"""`python -m jest_bench selection`, on super-batches small enough for a test: what it measures is what it says."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from jest_bench import report
from jest_bench.commands import app
from jest_bench.selection import Options, measure, tables

SMALL = ["selection", "--sizes", "256", "--width", "16", "--runs", "1"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "result.json"
    done = CliRunner().invoke(app, [*SMALL, "--json", str(file)])
    assert done.exit_code == 0, done.output
    return json.loads(file.read_text())


def test_the_command_writes_every_loss_to_its_json_file(result):
    assert [row["rows"] for row in result["growth"]] == [256]
    assert [(row["rows"], row["loss"]) for row in result["rules"]] == [(256, "sigmoid"), (256, "softmax")]
    assert result["machine"]["versions"]["torch"]


def test_ratios_are_those_of_the_figures_beside_them(result):
    for row in result["growth"]:
        seconds = row["seconds"]
        assert row["speed_ratio"] == min(seconds["numpy"], seconds["torch"]) / seconds["ours"]
        assert row["floor_ratio"] == seconds["ours"] / min(row["floors"].values())
        assert row["process_bytes"] > row["peak_bytes"]["ours"]
    for row in result["rules"]:
        assert 0 < row["bfloat16_overlap"] <= 1


def test_a_dense_rival_that_does_not_fit_into_memory_is_left_out_and_said_so(monkeypatch):
    monkeypatch.setattr(report, "free_memory", lambda: 1000)
    found = measure(Options(sizes=(128,), width=8, runs=1), lambda _: None)
    (row,) = found["growth"]
    assert row["rows"] == 128
    assert row["speed_ratio"] is None
    assert set(row["seconds"]) == {"ours", "floor"}
    assert "| – |" in tables(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "100,x"], "invalid literal"),
        (["--sizes", "20"], "num_chunks"),
        (["--filter-ratio", "1.5"], "filter_ratio"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_measured(options, message):
    done = CliRunner().invoke(app, ["selection", *options])
    assert done.exit_code == 2
    assert message in done.output
