"""Retrieval against what it cost: examples trained on, and wall-clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from outcome import Results
    from training import Point

_COLOURS = {"uniform": "#8a8f98", "JEST": "#d9480f"}
_REFERENCE = "#4263eb"


def draw_curves(results: Results, path: Path) -> None:
    """Draw both learners' retrieval on the test split as a PNG, with the point where JEST overtakes."""
    with mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 5), layout="constrained")
        FigureCanvasAgg(figure)
        by_examples, by_seconds = figure.subplots(1, 2, sharey=True)
        _panel(by_examples, results, "examples_trained", "examples trained on", "examples")
        _panel(by_seconds, results, "seconds", "wall-clock, seconds (evaluation left out)", "s")
        by_examples.set_ylabel("R@1 on the test split, %")
        by_seconds.legend(loc="lower right", frameon=False)
        figure.suptitle(results.verdict(), fontsize=12, x=0.01, ha="left", wrap=True)
        figure.savefig(path, dpi=120)


def _panel(axes: Axes, results: Results, cost: str, label: str, unit: str) -> None:
    for run in (results.uniform, results.jest):
        axes.plot(
            [0.0, *(getattr(point, cost) for point in run.points)],
            [0.0, *(100 * point.retrieval.mean for point in run.points)],
            color=_COLOURS[run.name],
            linewidth=2.2,
            label=run.name,
        )
    if results.reference is not None:
        axes.axhline(
            100 * results.reference.final.retrieval.mean,
            color=_REFERENCE,
            linestyle=":",
            label="reference model, trained on the curated part",
        )
    axes.axhline(100 * results.target, color=_COLOURS["uniform"], linestyle="--", linewidth=1)
    if results.reached is not None:
        _mark(axes, results.reached, cost, unit)
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)


def _mark(axes: Axes, reached: Point, cost: str, unit: str) -> None:
    value, height = getattr(reached, cost), 100 * reached.retrieval.mean
    axes.plot([value], [height], "o", color=_COLOURS["JEST"], markersize=8)
    axes.annotate(
        f"uniform's final\nreached at {value:,.0f} {unit}",
        (value, height),
        xytext=(12, -34),
        textcoords="offset points",
        color=_COLOURS["JEST"],
    )
