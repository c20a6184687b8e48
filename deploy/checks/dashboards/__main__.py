"""Runs the embedded stack, a short training run and a Prometheus, and asks it everything the dashboards ask.

`make dashboards-test` fails on any panel without an answer; `make report` draws the panels too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, run, say
from drawing import draw
from panels import Dashboard, finite, read
from prometheus import RULES, Prometheus, running, tool
from training import Runs, World, make_reference

from jest_server import __version__
from jest_server.local.process import LOOPBACK
from jest_server.local.stack import Stack

JOB = "first"
MUST_FIRE = ("JestFallbacks", "JestDeadLetters")
"""What has no `for` and was given reason: Prometheus has to have seen it."""


def main() -> None:
    """Checks, and draws if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="how long to train")
    parser.add_argument("--report", type=Path, help="folder for a PNG of each dashboard")
    options = parser.parse_args()
    torch.set_num_threads(1)
    check_rules()
    with tempfile.TemporaryDirectory(prefix="jest-dashboards-") as folder:
        world = World(seed=0)
        make_reference(Path(folder) / "repository", world)
        with Stack(Path(folder) / "repository") as stack, running(targets(stack), Path(folder)) as server:
            server.wait_for_all(len(targets(stack)))
            start_s, end_s = train(stack, world, options.seconds)
            dashboards = read()
            problems = unanswered(dashboards, server, start_s, end_s) + silent(server, start_s, end_s)
            if options.report is not None:
                options.report.mkdir(parents=True, exist_ok=True)
                note = f"jest-server {__version__}, {end_s - start_s:.0f} s of a small training run."
                for each in dashboards:
                    file = options.report / f"{each.uid}.png"
                    draw(each, server, file, job=JOB, start_s=start_s, end_s=end_s, note=note)
                    say(f"drawn: {file}")
    if problems:
        sys.exit("\n".join(problems))
    asked = sum(len(panel.targets) for each in dashboards for panel in each.panels)
    panels = sum(len(each.panels) for each in dashboards)
    say(f"all {asked} expressions of {panels} panels in {len(dashboards)} dashboards have answers")


def check_rules() -> None:
    """Checks the rules, and that every alert fires and stays silent as its tests say."""
    promtool = tool("promtool")
    run(promtool, "check", "rules", *sorted(RULES.glob("*.yaml")))
    run(promtool, "test", "rules", ROOT / "tests" / "observability" / "alerts.yaml")
    say("the rules are valid, and every alert fires and stays silent as its tests say")


def targets(stack: Stack) -> dict[str, str]:
    """Returns where each component's metrics are, by the job label it has everywhere."""
    found = {
        "selector": f"{LOOPBACK}:{stack.selector.metrics_port}",
        "scorer": f"{LOOPBACK}:{stack.scorer.metrics_port}",
        "control": f"{LOOPBACK}:{stack.control.metrics_port}",
    }
    if stack.triton is None:
        raise SystemExit("; ".join(stack.stand_ins))
    return found | {"triton": stack.triton.metrics_url.removeprefix("http://").removesuffix("/metrics")}


def train(stack: Stack, world: World, seconds: float) -> tuple[float, float]:
    """Trains for a while and returns when it began and ended."""
    runs = Runs(stack, world)
    start_s = time.time()
    try:
        runs.watch_control()
        runs.start("first", pause_s=0.1)
        time.sleep(seconds * 0.3)
        runs.start("second", pause_s=0.2)
        runs.start("fresh-data", pause_s=0.4, fresh=True)
        time.sleep(seconds * 0.3)
        runs.meet_trouble("troubled")
        time.sleep(max(0.0, start_s + seconds - time.time()))
        return start_s, time.time()
    finally:
        runs.stop()


def unanswered(dashboards: list[Dashboard], server: Prometheus, start_s: float, end_s: float) -> list[str]:
    """Returns a sentence for each expression that never had a finite value."""
    return [
        f"{dashboard.uid}: panel {panel.title!r}: no answer to {target.asked(JOB)}"
        for dashboard in dashboards
        for panel in dashboard.panels
        for target in panel.targets
        if not finite(server.series(target.asked(JOB), start_s, end_s))
    ]


def silent(server: Prometheus, start_s: float, end_s: float) -> list[str]:
    """Returns a sentence for each alert that had reason to fire and did not."""
    return [
        f"alert {name} did not fire, though it was given reason to"
        for name in MUST_FIRE
        if not server.series(f'ALERTS{{alertname="{name}", alertstate="firing"}}', start_s, end_s)
    ]


if __name__ == "__main__":
    main()
