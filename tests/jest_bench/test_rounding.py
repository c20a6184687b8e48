"""`python -m jest_bench rounding`, on super-batches small enough for a test."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from jest_bench.commands import app

SMALL = ["rounding", "--sizes", "256", "--width", "16", "--seeds", "2"]


def test_rounding_more_changes_more_and_less_than_another_draw(tmp_path):
    file = tmp_path / "result.json"
    done = CliRunner().invoke(app, [*SMALL, "--json", str(file)])
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())["rows"]
    assert [(row["rows"], row["loss"]) for row in rows] == [(256, "sigmoid"), (256, "softmax")]
    for row in rows:
        overlaps = row["overlaps"]
        assert 0 < overlaps["other_seed"] < overlaps["int8"] <= overlaps["float16"] <= 1
        assert row["bytes"] == {"float16": 256 * 2 * 2 * 16, "int8": 256 * 2 * (4 + 16)}
        assert f"{overlaps['int8']:.1%}" in done.output


@pytest.mark.parametrize(
    ("options", "message"), [(["--sizes", "1,x"], "invalid literal"), (["--filter-ratio", "2"], "filter_ratio")]
)
def test_options_that_cannot_be_are_refused(options, message):
    done = CliRunner().invoke(app, ["rounding", *options])
    assert done.exit_code == 2
    assert message in done.output
