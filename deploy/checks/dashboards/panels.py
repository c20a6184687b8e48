"""The dashboards' questions, as Grafana would put them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "observability" / "dashboards"
RATE_INTERVAL = "8s"
"""What Grafana makes of $__rate_interval where everything is scraped every second, and a little more."""


@dataclass(frozen=True)
class Target:
    """One expression, and how its series are called."""

    expr: str
    legend: str

    def asked(self, job: str) -> str:
        """Returns the expression without variables."""
        return self.expr.replace("$__rate_interval", RATE_INTERVAL).replace("$jest_job", job)

    def name(self, labels: dict[str, str]) -> str:
        """Returns what the legend calls a series."""
        name = self.legend
        for label, value in labels.items():
            name = name.replace("{{" + label + "}}", value)
        return name.removeprefix("/jest.v1.")


@dataclass(frozen=True)
class Panel:
    """What is drawn of it."""

    title: str
    description: str
    unit: str
    stacked: bool
    row: str
    x: int
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Dashboard:
    """One file."""

    uid: str
    title: str
    description: str
    panels: tuple[Panel, ...]


def read(folder: Path = FOLDER) -> list[Dashboard]:
    """Returns all dashboards."""
    return [_dashboard(json.loads(file.read_text())) for file in sorted(folder.glob("*.json"))]


def finite(series: list[dict[str, Any]]) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
    """Returns labels and points of the series that have finite values."""
    points = [
        (each["metric"], [(float(t), float(v)) for t, v in each["values"] if math.isfinite(float(v))])
        for each in series
    ]
    return [(labels, values) for labels, values in points if values]


def _dashboard(found: dict[str, Any]) -> Dashboard:
    panels: list[Panel] = []
    row = ""
    for each in found["panels"]:
        if each["type"] == "row":
            row = each["title"]
            continue
        defaults = each["fieldConfig"]["defaults"]
        panels.append(
            Panel(
                title=each["title"],
                description=each["description"],
                unit=defaults["unit"],
                stacked=defaults["custom"].get("stacking", {}).get("mode") == "normal",
                row=row,
                x=each["gridPos"]["x"],
                targets=tuple(Target(target["expr"], target["legendFormat"]) for target in each["targets"]),
            )
        )
    return Dashboard(found["uid"], found["title"], found["description"], tuple(panels))
