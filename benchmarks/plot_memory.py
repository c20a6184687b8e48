"""Draws what `python -m jest_bench memory --json RESULT` saw: `python benchmarks/plot_memory.py RESULT PICTURE.svg`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "jest"  # the same numbers give the same file

from matplotlib import pyplot as plt  # noqa: E402 - after the choice of what draws

MEBI = 2**20


def main(result: Path, picture: Path) -> None:
    """Writes the picture."""
    samples = json.loads(result.read_text())["samples"]
    at_s = [sample["at_s"] for sample in samples]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name in samples[0]["resident_bytes"]:
        axes.plot(at_s, [sample["resident_bytes"][name] / MEBI for sample in samples], label=name)
    for name in ("queue", "cache"):
        used = [sample[f"{name}_used_bytes"] / MEBI for sample in samples]
        axes.plot(at_s, used, linestyle=":", label=f"{name}, used as Redis says")
    axes.set(xlabel="seconds", ylabel="MiB resident", ylim=(0, None), xlim=(0, max(at_s)))
    axes.legend(ncols=2, fontsize="small", loc="center right")
    axes.grid(alpha=0.3)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
