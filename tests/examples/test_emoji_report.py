import io
import json
import re
from html.parser import HTMLParser

import page
import pytest
import torch
from curves import draw_curves
from outcome import Results
from page import most_chosen_and_refused
from pairs import Pair
from PIL import Image
from report import summary_table, write_results
from rich.console import Console
from training import Account, Point, Retrieval, Run


def _run(name, curve, settings, pool_size):
    account = Account(pool_size)
    points = [
        Point(step, 500 * step, 100 * step, float(step), 1.0, Retrieval(level, level))
        for step, level in enumerate(curve, start=1)
    ]
    account.examples_loaded, account.examples_trained = points[-1].examples_loaded, points[-1].examples_trained
    return Run(name, settings, account, points)


@pytest.fixture
def results(prepared, tiny_plan):
    return _results(prepared, tiny_plan, [0.1, 0.25, 0.3, 0.3])


def _results(prepared, plan, jest_curve):
    size = len(prepared.stream)
    jest = _run("JEST", jest_curve, plan.jest, size)
    jest.account.times_seen[:] = 10
    for row, pair in enumerate(prepared.stream.pairs):
        jest.account.times_trained[row] = 9 if pair.kind == "clean" else 0
    uniform = _run("uniform", [0.05, 0.1, 0.15, 0.2], plan.uniform, size)
    reference = _run("reference", [0.28], plan.reference, 500)
    return Results(plan, 7, reference, uniform, jest, inference="this process")


class _Checker(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.pictures, self.remote = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.pictures.append(attrs["src"])
        if tag not in {"meta", "img", "br", "link"}:
            self.open.append(tag)
        self.remote += [value for name, value in attrs.items() if name == "src" and not value.startswith("data:")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def folder(results, prepared, tmp_path):
    write_results(results, prepared, tmp_path / "results")
    return tmp_path / "results"


def test_figures_are_written_as_json(folder):
    written = json.loads((folder / "results.json").read_text())
    assert written["examples_ratio"] == 2.0
    assert written["reached"]["examples_trained"] == 200
    assert [run["name"] for run in written["runs"]] == ["reference", "uniform", "JEST"]
    assert written["runs"][2]["totals"]["examples_loaded"] == 2000
    assert len(written["runs"][1]["points"]) == 4


def test_curves_are_a_picture_wide_enough_to_read(folder):
    with Image.open(folder / "curves.png") as curves:
        assert curves.format == "PNG"
        assert curves.width >= 1000


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(folder):
    checker = _Checker()
    checker.feed((folder / "pairs.html").read_text())
    assert checker.open == []
    assert checker.remote == []
    assert len(checker.pictures) == 1 + 2 * 28


def test_the_page_names_both_vendors_and_their_licences(folder):
    page = (folder / "pairs.html").read_text()
    for needed in ("Twitter, Inc.", "CC-BY 4.0", "OpenMoji", "CC-BY-SA 4.0"):
        assert needed in page


def test_chosen_and_refused_pairs_are_the_right_way_round(results, prepared):
    chosen, refused = most_chosen_and_refused(results.jest.account, prepared.stream)
    assert {prepared.stream.pairs[pair.row].kind for pair in chosen} == {"clean"}
    assert "clean" not in {prepared.stream.pairs[pair.row].kind for pair in refused}


def test_pairs_that_were_hardly_seen_are_not_shown(results, prepared):
    results.jest.account.times_seen[:] = 1
    assert most_chosen_and_refused(results.jest.account, prepared.stream) == ([], [])


def test_captions_cannot_break_the_page(results, prepared, monkeypatch, tmp_path):
    monkeypatch.setattr(prepared.stream, "pairs", [Pair(0, "<b>", "<script>$verdict</script>")])
    results.jest.account.times_seen = torch.tensor([10])
    results.jest.account.times_trained = torch.tensor([1])
    draw_curves(results, tmp_path / "curves.png")
    page.write_page(results, prepared.stream, tmp_path / "curves.png", tmp_path / "pairs.html")
    written = (tmp_path / "pairs.html").read_text()
    assert "<script>" not in written
    assert "&lt;script&gt;$verdict" in written


def test_the_table_shows_costs_beside_savings(results):
    console = Console(width=140, file=io.StringIO())
    console.print(summary_table(results))
    printed = console.file.getvalue()
    assert re.search(r"examples loaded.*2,000.*2,000", printed)
    assert re.search(r"reach uniform's final.*400.*200 \(2\.0 times fewer\)", printed)
    for cost in ("learner", "scoring", "waiting", "reference inferences", "cache hits"):
        assert cost in printed


def test_the_verdict_says_so_when_jest_loses(prepared, tiny_plan, tmp_path):
    lost = _results(prepared, tiny_plan, [0.1, 0.15, 0.15, 0.19])
    write_results(lost, prepared, tmp_path)
    assert "did not reach" in json.loads((tmp_path / "results.json").read_text())["verdict"]
    assert lost.examples_ratio is None
    assert "not reached" in (tmp_path / "pairs.html").read_text()
    assert summary_table(lost).row_count == 10
