"""What is written at the end: figures as JSON, curves, a page of chosen and refused pairs, and a table to read."""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from curves import draw_curves
from data import EmojiData
from outcome import Results
from page import write_page
from rich.table import Table
from training import Run


def write_results(results: Results, data: EmojiData, folder: Path) -> None:
    """Write `results.json`, `curves.png` and `pairs.html` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(as_json(results, data), indent=2) + "\n", encoding="utf-8")
    draw_curves(results, folder / "curves.png")
    write_page(results, data.stream, folder / "curves.png", folder / "pairs.html")


def as_json(results: Results, data: EmojiData) -> dict[str, object]:
    """Everything that was measured, as plain JSON values."""
    return {
        "verdict": results.verdict(),
        "notes": results.notes(),
        "target_recall_at_1": results.target,
        "examples_ratio": results.examples_ratio,
        "seconds_ratio": results.seconds_ratio,
        "reached": results.reached and asdict(results.reached),
        "seed": results.seed,
        "test_pairs": len(data.test),
        "stream_pairs": len(data.stream),
        "reference_inference": results.inference,
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "machine": platform.machine(),
        },
        "plan": asdict(results.plan),
        "runs": [_run_as_json(run) for run in (results.reference, results.uniform, results.jest) if run],
    }


def summary_table(results: Results) -> Table:
    """Lay both runs side by side, costs included."""
    table = Table("", *(run.name for run in results.learners), title="Emoji retrieval, test split")
    for column in table.columns[1:]:
        column.justify = "right"
    costs = [run.account for run in results.learners]
    rows = {
        "examples loaded": [f"{cost.examples_loaded:,}" for cost in costs],
        "examples trained": [f"{cost.examples_trained:,}" for cost in costs],
        "wall-clock": [f"{run.final.seconds:.1f} s" for run in results.learners],
        "  learner": [f"{cost.learner_seconds:.1f} s" for cost in costs],
        "  scoring": [f"{cost.scoring_seconds:.1f} s" for cost in costs],
        "  waiting": [f"{cost.waiting_seconds:.1f} s" for cost in costs],
        "reference inferences": [f"{cost.reference_inferences:,}" for cost in costs],
        "cache hits": [f"{cost.cache_hits:,}" for cost in costs],
        "final R@1": [f"{run.final.retrieval.mean:.1%}" for run in results.learners],
        "examples to reach uniform's final R@1": [
            f"{results.uniform.final.examples_trained:,}",
            f"{results.reached.examples_trained:,} ({results.examples_ratio:.1f} times fewer)"
            if results.reached
            else "not reached",
        ],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def _run_as_json(run: Run) -> dict[str, object]:
    return {
        "name": run.name,
        "settings": asdict(run.settings),
        "totals": run.account.totals(),
        "final_recall_at_1": run.final.retrieval.mean,
        "points": [asdict(point) for point in run.points],
    }
