"""Dashboards as pictures: the same panels, drawn without Grafana."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, MaxNLocator, MultipleLocator
from panels import finite

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from panels import Dashboard, Panel
    from prometheus import Prometheus

COLUMNS = 3
COLOURS = ("#3274d9", "#ff780a", "#56a64b", "#e02f44", "#8f3bb8", "#e0b400", "#0f8b8d", "#7c7c7c")
UNITS = {"ops": "per second", "bytes": "bytes", "s": "time", "percentunit": "share", "none": "", "short": ""}
_BINARY = 1024


def draw(
    dashboard: Dashboard, server: Prometheus, file: Path, *, job: str, start_s: float, end_s: float, note: str
) -> None:
    """Draws a dashboard of what happened between two times."""
    mpl.rcParams.update(
        {"font.size": 9, "axes.titlesize": 11, "axes.titleweight": "bold", "font.family": "DejaVu Sans"}
    )
    rows: dict[str, list[Panel]] = {}
    for panel in dashboard.panels:
        rows.setdefault(panel.row, []).append(panel)
    lines = [(title, row[i : i + COLUMNS]) for title, row in rows.items() for i in range(0, len(row), COLUMNS)]
    figure = Figure(figsize=(16, 3.6 * len(lines) + 1.3), dpi=80, facecolor="#f7f8fa")
    figure.text(0.012, 1 - 0.35 / figure.get_figheight(), dashboard.title, size=17, weight="bold", va="center")
    figure.text(0.012, 1 - 0.68 / figure.get_figheight(), f"{dashboard.description}  {note}", size=10, color="#555")
    grid = figure.add_gridspec(
        len(lines),
        COLUMNS,
        left=0.045,
        right=0.985,
        top=1 - 1.85 / figure.get_figheight(),
        bottom=0.75 / figure.get_figheight(),
        hspace=0.78,
        wspace=0.2,
    )
    for y, (title, row) in enumerate(lines):
        for x, panel in enumerate(row):
            axes = figure.add_subplot(grid[y, x])
            _panel(axes, panel, server, job, start_s, end_s)
            if x == 0 and (y == 0 or lines[y - 1][0] != title):
                axes.annotate(title, (-0.1, 1.27), xycoords="axes fraction", size=12, color="#3274d9", weight="bold")
    figure.savefig(file)


def _panel(axes: Axes, panel: Panel, server: Prometheus, job: str, start_s: float, end_s: float) -> None:
    drawn: list[tuple[str, list[float], list[float]]] = []
    for target in panel.targets:
        for labels, points in finite(server.series(target.asked(job), start_s, end_s)):
            drawn.append((target.name(labels), [t - start_s for t, _ in points], [v for _, v in points]))
    if panel.stacked:
        _stack(axes, drawn)
    else:
        for colour, (name, times, values) in zip(_colours(len(drawn)), drawn, strict=True):
            axes.plot(times, values, label=name, color=colour, linewidth=1.6)
            axes.fill_between(times, values, alpha=0.05, color=colour)
    axes.set_title(panel.title, loc="left", pad=22)
    about = textwrap.shorten(panel.description, 92, placeholder=" …")
    axes.annotate(about, (0, 1.035), xycoords="axes fraction", size=7.5, color="#666")
    axes.set_facecolor("white")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_xlim(0, end_s - start_s)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{int(t) // 60}:{int(t) % 60:02d}"))
    axes.yaxis.set_major_locator(_ticks(panel.unit, drawn))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, panel.unit)))
    if all(value >= 0 for _, _, values in drawn for value in values):
        top = max((value for _, _, values in drawn for value in values), default=0)
        axes.set_ylim(0, 1 if panel.stacked and panel.unit == "percentunit" else axes.get_ylim()[1] if top else 1)
    axes.set_ylabel(UNITS.get(panel.unit, panel.unit), color="#666", size=8)
    longest = max((len(name) for name, _, _ in drawn), default=0)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.1),
        ncols=max(1, min(4, 68 // (longest + 6))),
        frameon=False,
        fontsize=7.5,
        handlelength=1.2,
        columnspacing=1.2,
        labelspacing=0.2,
    )


def _stack(axes: Axes, drawn: list[tuple[str, list[float], list[float]]]) -> None:
    times = sorted({t for _, series, _ in drawn for t in series})
    rows = []
    for _, series, values in drawn:
        at = dict(zip(series, values, strict=True))
        rows.append([at.get(t, 0.0) for t in times])
    axes.stackplot(times, rows, labels=[name for name, _, _ in drawn], colors=_colours(len(drawn)), alpha=0.75)


def _ticks(unit: str, drawn: list[tuple[str, list[float], list[float]]]) -> Locator:
    """Round numbers; of bytes, in powers of two."""
    largest = max((value for _, _, values in drawn for value in values), default=0.0)
    if unit != "bytes" or largest < 1:
        return MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
    return MultipleLocator(2.0 ** (math.ceil(math.log2(largest)) - 2))


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def formatted(value: float, unit: str) -> str:
    """Writes a value as Grafana would."""
    if unit == "percentunit":
        return f"{100 * value:.0f} %"
    if unit == "s":
        return f"{1000 * value:g} ms" if 0 < abs(value) < 1 else f"{value:g} s"
    if unit == "bytes":
        for name in ("B", "KiB", "MiB"):
            if abs(value) < _BINARY:
                return f"{value:.3g} {name}"
            value /= _BINARY
        return f"{value:.3g} GiB"
    return f"{value / 1000:g} k" if abs(value) >= 10_000 else f"{value:g}"
