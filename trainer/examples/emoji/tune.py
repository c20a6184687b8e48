"""Choose each method's learning rate on the validation split (about two minutes a line on one core).

    python trainer/examples/emoji/tune.py --seed 1000

Every method gets the same tries over the same grid. The test split is not touched, and the demo's seeds are others.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from data import prepare
from experiment import FULL, in_process, train_reference, train_selected, train_uniform
from rich.console import Console
from rich.live import Live
from rich.table import Table

LEARNING_RATES = (1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2)


def main() -> None:
    """Train both methods once per learning rate and print validation retrieval."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache/emoji"))
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=LEARNING_RATES)
    arguments = parser.parse_args()
    seed = arguments.seed

    data = prepare(arguments.cache_dir, seed, FULL.curated_pairs)
    pairs = data.validation.everything()
    reference, taught = train_reference(data, FULL, seed, pairs)
    table = Table("learning rate", "uniform R@1", "JEST R@1", title="validation split, after the last step")
    table.caption = f"seed {seed}; reference R@1 {taught.final.retrieval.mean:.3f}"
    with Live(table, console=Console()):
        for rate in arguments.learning_rates:
            plan = replace(
                FULL,
                uniform=replace(FULL.uniform, learning_rate=rate),
                jest=replace(FULL.jest, learning_rate=rate),
            )
            uniform = train_uniform(data, plan, seed, pairs)
            jest = train_selected(data, plan, seed, pairs, in_process(data, plan, seed, reference))
            table.add_row(f"{rate:g}", *(f"{run.final.retrieval.mean:.3f}" for run in (uniform, jest)))


if __name__ == "__main__":
    main()
