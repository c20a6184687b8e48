"""Does selection pay? Train the same model twice on a web-like stream of emoji: as it comes, and selected by JEST.

    python trainer/examples/emoji/demo.py            # about five minutes on two cores
    python trainer/examples/emoji/demo.py --quick    # about one
    python trainer/examples/emoji/demo.py --server HOST:PORT    # on a stack that serves reference.py's model

Writes `results.json`, `curves.png` and `pairs.html`, and prints a table.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

from data import prepare
from experiment import FULL, QUICK, train_reference, train_selected, train_uniform
from outcome import Results
from report import summary_table, write_results
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from served import counted_inference, running_stack, served
from training import Point, Settings

from jest_trainer import Client


class Bar:
    """A run's progress bar with its live loss and its last retrieval."""

    def __init__(self, progress: Progress, name: str, settings: Settings) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task(name, total=settings.steps, loss="-", retrieval="-")

    def on_step(self, step: int, loss: float) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step, loss=f"{loss:.3f}")

    def on_point(self, point: Point) -> None:
        """Show a new evaluation."""
        self._progress.update(self._task, retrieval=f"{point.retrieval.mean:.1%}")


def main() -> None:
    """Prepare the data, train the reference and both learners, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same path with fewer steps, about one minute")
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache/emoji"), help="keeps the drawn pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server", metavar="HOST:PORT", help="selector of a running stack; none: one is started here")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    seed = arguments.seed
    console = Console()

    with _progress(console) as progress:
        drawing = progress.add_task("drawing emoji", total=None, loss="", retrieval="")
        data = prepare(
            arguments.cache_dir,
            seed,
            plan.curated_pairs,
            lambda done, total: progress.update(drawing, completed=done, total=total),
        )
        progress.remove_task(drawing)
        test = data.test.everything()
        taught = None
        with ExitStack() as running:
            if arguments.server is None:
                reference, taught = train_reference(data, plan, seed, test, Bar(progress, "reference", plan.reference))
            uniform = train_uniform(data, plan, seed, test, Bar(progress, "uniform", plan.uniform))
            if arguments.server is None:
                folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="jest-demo-")))
                stack = running.enter_context(running_stack(reference, data, folder, progress.console.print))
            client = running.enter_context(Client(arguments.server or stack.address))
            source = served(data, plan, seed, client)
            jest = train_selected(data, plan, seed, test, source, Bar(progress, "JEST", plan.jest))
            inference = f"the stack at {arguments.server}" if arguments.server else counted_inference(stack)

    results = Results(plan, seed, taught, uniform, jest, inference)
    write_results(results, data, arguments.results_dir)
    console.print(summary_table(results))
    console.print(results.verdict(), style="bold")
    for note in results.notes():
        console.print(f"- {note}")
    console.print(f"\n{arguments.results_dir}: results.json, curves.png, pairs.html")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  R@1 {task.fields[retrieval]}"),
        TimeElapsedColumn(),
        console=console,
    )


if __name__ == "__main__":
    main()
