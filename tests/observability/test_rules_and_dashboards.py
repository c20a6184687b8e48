"""Rules and dashboards ask for what there is, in a language that Prometheus and Grafana read.

Whether they get answers, and whether alerts fire, `make dashboards-test` finds out with a real Prometheus.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import promql_parser
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from jest_server.runtime import metrics_page

ROOT = Path(__file__).parents[2]
OF_OTHERS = {"up", "nv_inference_request_success", "nv_inference_request_failure"}
"""Prometheus' own, and Triton's, as its documentation lists them; the live check sees them answered."""


def names_in(expr):
    """Every series an expression asks for, from its syntax tree."""
    found, open_nodes = set(), [promql_parser.parse(expr)]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, promql_parser.VectorSelector):
            found.add(node.name)
        children = (getattr(node, name, None) for name in ("expr", "lhs", "rhs", "args", "param", "vector_selector"))
        for child in children:
            open_nodes += child if isinstance(child, list) else [child] if child is not None else []
    return found


def without_variables(expr):
    return expr.replace("$__rate_interval", "1m").replace("$jest_job", "a-job")


def targets_of(dashboard):
    return [target for panel in dashboard["panels"] for target in panel.get("targets", [])]


@pytest.fixture(scope="module")
def known(rules):
    ours = {
        name for process in metrics_page.PROCESSES for each in metrics_page.measured(process) for name in each.series()
    }
    return ours | OF_OTHERS | {rule["record"] for rule in rules if "record" in rule}


def lacking(ours, theirs, path=""):
    """Where something of ours is not, or is not the same, in theirs."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            place
            for key, value in ours.items()
            for place in ([f"{path}.{key}"] if key not in theirs else lacking(value, theirs[key], f"{path}.{key}"))
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            place for i, pair in enumerate(zip(ours, theirs, strict=True)) for place in lacking(*pair, f"{path}[{i}]")
        ]
    return [] if ours == theirs else [path]


def test_the_syntax_tree_gives_away_every_name():
    expr = (
        'sum by (a) (rate(b{c="d"}[5m] offset 1h)) / on () group_left () quantile(0.9, max_over_time(e[1h:1m])) or -f'
    )
    assert names_in(expr) == {"b", "e", "f"}


def test_there_are_three_dashboards(dashboards):
    assert [each["uid"] for each in dashboards.values()] == ["jest-job", "jest-operations", "jest-selection"]


def test_the_dashboards_are_what_the_script_makes(dashboards, make_dashboards):
    made = {name: json.loads(text) for name, text in make_dashboards.files().items()}
    assert dashboards == made, "run: make documents"


def test_grafana_s_own_library_reads_and_writes_them_without_loss(dashboards):
    for dashboard in dashboards.values():
        again = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
        assert lacking(dashboard, again) == []


def test_every_panel_says_what_to_look_for_and_asks_the_prometheus_that_is_chosen(dashboards):
    for dashboard in dashboards.values():
        assert dashboard["templating"]["list"][0]["name"] == "datasource"
        for panel in dashboard["panels"]:
            if panel["type"] != "row":
                assert len(panel["description"]) > 10, panel["title"]
                assert panel["datasource"]["uid"] == "${datasource}"
                assert panel["targets"]


def test_every_expression_of_a_dashboard_parses_and_asks_for_what_there_is(dashboards, known):
    for dashboard in dashboards.values():
        for target in targets_of(dashboard):
            assert names_in(without_variables(target["expr"])) <= known, target["expr"]


def test_panels_of_one_job_ask_for_that_job_alone(dashboards):
    for target in targets_of(dashboards["jest-job.json"]):
        selectors = re.findall(r"jest_job_\w+(\{[^}]*\})?", target["expr"])
        assert selectors
        assert all('jest_job="$jest_job"' in selector for selector in selectors), target["expr"]


def test_every_rule_parses_and_asks_for_what_there_is(rules, known):
    for rule in rules:
        assert names_in(rule["expr"]) <= known, rule


def test_every_alert_has_a_severity_a_runbook_and_words(rules):
    runbooks = {
        f"docs/operations.md#{heading.lower()}"
        for heading in re.findall(r"^#+ (\S+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    }
    for alert in (rule for rule in rules if "alert" in rule):
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert {"summary", "description", "runbook_url"} == set(alert["annotations"])
        assert alert["annotations"]["runbook_url"] == f"docs/operations.md#{alert['alert'].lower()}"
        assert alert["annotations"]["runbook_url"] in runbooks, alert["alert"]


def test_every_alert_is_tried_both_firing_and_silent(rules, alert_tests):
    asked = [each for test in alert_tests for each in test["alert_rule_test"]]
    for name in (rule["alert"] for rule in rules if "alert" in rule):
        outcomes = {bool(each["exp_alerts"]) for each in asked if each["alertname"] == name}
        assert outcomes == {True, False}, name
