"""What came out, whoever won: figures as JSON, curves, a page of chosen and refused pairs, and a table to read."""

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from curves import draw_curves
from data import EmojiData
from experiment import Plan
from page import write_page
from rich.table import Table
from training import Point, Run


@dataclass(frozen=True)
class Results:
    """One run of the demo.

    Attributes:
        reference: training of the reference model; part of neither learner's figures. None: the stack had one.
        uniform: the learner that trained on the stream as it came.
        jest: the learner whose sub-batches were selected.
        inference: who embedded for the reference model ("Triton ...", "this process").
    """

    plan: Plan
    seed: int
    reference: Run | None
    uniform: Run
    jest: Run
    inference: str

    @property
    def target(self) -> float:
        """Uniform's final retrieval, the level that JEST has to reach."""
        return self.uniform.final.retrieval.mean

    @property
    def reached(self) -> Point | None:
        """Where JEST's curve reached the target for good."""
        return self.jest.reach(self.target)

    @property
    def examples_ratio(self) -> float | None:
        """How many times more examples uniform trained on than JEST needed to get as far."""
        reached = self.reached
        return None if reached is None else self.uniform.final.examples_trained / reached.examples_trained

    @property
    def seconds_ratio(self) -> float | None:
        """The same in wall-clock; below one, JEST was slower."""
        reached = self.reached
        return None if reached is None else self.uniform.final.seconds / reached.seconds

    def verdict(self) -> str:
        """Say in one sentence who needed how many examples."""
        uniform = self.uniform.final
        if self.reached is None or self.examples_ratio is None:
            return (
                f"JEST did not reach uniform's final retrieval ({self.target:.1%}): "
                f"it ended at {self.jest.final.retrieval.mean:.1%}."
            )
        return (
            f"JEST reached uniform's final retrieval ({self.target:.1%}) after training on "
            f"{self.reached.examples_trained:,} examples instead of {uniform.examples_trained:,} "
            f"({self.examples_ratio:.1f} times fewer), and ended at {self.jest.final.retrieval.mean:.1%}."
        )

    def notes(self) -> list[str]:
        """Say what a reader has to know to judge the figures."""
        notes = []
        if self.reached is not None:
            looked_at = self.reached.examples_loaded / self.uniform.final.examples_loaded
            notes.append(
                f"The ratio counts examples trained on. To reach the target JEST looked at "
                f"{self.reached.examples_loaded:,} examples, {looked_at:.2f} times as many as uniform, "
                f"and took {self.reached.seconds:.0f} s of wall-clock where uniform took "
                f"{self.uniform.final.seconds:.0f} s."
            )
        if self.reference is not None:
            reference = self.reference.final
            notes.append(
                f"Training the reference took {reference.seconds:.0f} s on {self.plan.curated_pairs:,} clean pairs and "
                "is counted in neither run: it pays when several jobs share the reference or it is used again. "
                f"By itself the reference retrieves {reference.retrieval.mean:.1%}."
            )
        notes.append(f"For the reference model, embeddings were computed by {self.inference}.")
        notes.append(
            "The stream was made to show what selection is for: a few emoji are repeated all the time, and half of "
            "the captions are useless. Most of the gain is cleaning and avoiding duplicates; on a clean stream "
            "without a duplicated head there is little to win."
        )
        notes.append(
            "The two learners start from the same weights. Learning rates were chosen for each on a validation "
            "split, with equally many tries; retrieval is measured on drawings that are in no training pair."
        )
        notes.append("This is one seed and a small test set: differences of one or two points mean nothing.")
        return notes


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
    table = Table("", *(run.name for run in _learners(results)), title="Emoji retrieval, test split")
    for column in table.columns[1:]:
        column.justify = "right"
    costs = [run.account for run in _learners(results)]
    rows = {
        "examples loaded": [f"{cost.examples_loaded:,}" for cost in costs],
        "examples trained": [f"{cost.examples_trained:,}" for cost in costs],
        "wall-clock": [f"{run.final.seconds:.1f} s" for run in _learners(results)],
        "  learner": [f"{cost.learner_seconds:.1f} s" for cost in costs],
        "  scoring": [f"{cost.scoring_seconds:.1f} s" for cost in costs],
        "  waiting": [f"{cost.waiting_seconds:.1f} s" for cost in costs],
        "reference inferences": [f"{cost.reference_inferences:,}" for cost in costs],
        "cache hits": [f"{cost.cache_hits:,}" for cost in costs],
        "final R@1": [f"{run.final.retrieval.mean:.1%}" for run in _learners(results)],
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


def _learners(results: Results) -> tuple[Run, Run]:
    return results.uniform, results.jest


def _run_as_json(run: Run) -> dict[str, object]:
    return {
        "name": run.name,
        "settings": asdict(run.settings),
        "totals": run.account.totals(),
        "final_recall_at_1": run.final.retrieval.mean,
        "points": [asdict(point) for point in run.points],
    }
