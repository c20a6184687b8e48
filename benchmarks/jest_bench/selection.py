"""How fast and how large a selection is: against dense implementations, against its bare products, and as it grows.

Run it with `python -m jest_bench selection`. Everything is timed in one process, contenders alternating; peak memory
is measured in a fresh process for each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jest_bench import dense, report
from jest_bench.problem import SuperBatch, super_batch
from jest_core import SelectionPolicy, select_sub_batch
from jest_core.joint import chunk_boundaries

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jest_core import Embeddings

DENSE_BYTES_PER_PAIR = 8
"""Two float32 matrices of all pairs: what either dense implementation holds at its peak."""
SHARE_OF_MEMORY = 0.6
"""The share of the free memory that a dense implementation may take; above it, it is left out."""
BLOCKS = (1024, 2048)
"""Rows of one product of the floor. The faster counts; all rows at once would be slower."""

CONTENDERS = ("numpy", "torch", "ours")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    sizes: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    width: int = 512
    filter_ratio: float = 0.8
    num_chunks: int = 16
    runs: int = 5
    precision_up_to: int = 16384

    def __post_init__(self) -> None:
        for rows in self.sizes:
            self.boundaries(rows)

    @property
    def policy(self) -> SelectionPolicy:
        """The published method."""
        return SelectionPolicy(filter_ratio=self.filter_ratio, num_chunks=self.num_chunks)

    def boundaries(self, rows: int) -> tuple[int, ...]:
        """Offsets of the chunks of a sub-batch chosen from so many rows."""
        return chunk_boundaries(self.policy.resolve_sub_batch_size(rows), self.num_chunks)


def measure(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures everything; ``say`` is told what is being done."""
    result: dict[str, Any] = {
        "benchmark": "selection",
        "machine": report.machine(),
        "width": options.width,
        "filter_ratio": options.filter_ratio,
        "num_chunks": options.num_chunks,
        "runs": options.runs,
        "growth": [],
        "rules": [],
    }
    for rows in options.sizes:
        say(f"B = {rows:,}: against dense and against the products alone")
        result["growth"].append(_growth(options, rows))
        if rows <= options.precision_up_to:
            say(f"B = {rows:,}: losses and precisions")
            result["rules"] += _rules(options, rows)
    return result


def tables(result: dict[str, Any]) -> str:
    """Renders a result as Markdown."""
    growth = [
        [
            f"{row['rows']:,}",
            *(_seconds(row["seconds"].get(name)) for name in ("numpy", "torch", "ours", "floor")),
            _ratio(row["speed_ratio"]),
            _ratio(row["floor_ratio"]),
            *(_mebibytes(row["peak_bytes"].get(name)) for name in CONTENDERS),
            _ratio(row["memory_ratio"]),
            _mebibytes(row["process_bytes"]),
        ]
        for row in result["growth"]
    ]
    header = ["B", "NumPy s", "PyTorch s", "ours s", "floor s", "dense ÷ ours", "ours ÷ floor"]
    header += ["NumPy MiB", "PyTorch MiB", "ours MiB", "dense ÷ ours", "our process MiB"]
    rules = [
        [
            f"{row['rows']:,}",
            row["loss"],
            *(_seconds(row["seconds"][name]) for name in ("float32", "bfloat16", "floor")),
            _ratio(row["floor_ratio"]),
            _ratio(row["bfloat16_speed_ratio"]),
            f"{row['bfloat16_overlap']:.1%}",
            f"{row['other_seed_overlap']:.1%}",
        ]
        for row in result["rules"]
    ]
    rules_header = ["B", "loss", "float32 s", "bfloat16 s", "floor s", "float32 ÷ floor", "float32 ÷ bfloat16"]
    rules_header += ["same pairs in bfloat16", "same pairs by another seed"]
    return "\n\n".join((report.markdown(header, growth), report.markdown(rules_header, rules)))


def _growth(options: Options, rows: int) -> dict[str, Any]:
    batch = super_batch(rows, options.width)
    contenders = [name for name in CONTENDERS if name == "ours" or _fits(rows)]
    works = {name: _work(name, batch, options) for name in contenders}
    works |= {f"floor {block}": _floor(batch, options, block) for block in BLOCKS}
    if _fits(rows):
        works["dense products"] = partial(_dense_products, batch)
    seconds = report.alternate(works, runs=options.runs)
    floors = {name: seconds.pop(name) for name in list(seconds) if name.startswith("floor")}
    seconds["floor"] = min(floors.values())
    peaks = {name: report.peak_memory(_prepare, name, rows, options) for name in contenders}
    dense_seconds = [seconds[name] for name in contenders if name != "ours"]
    dense_bytes = [peaks[name].used for name in contenders if name != "ours"]
    return {
        "rows": rows,
        "sub_batch": options.policy.resolve_sub_batch_size(rows),
        "seconds": seconds,
        "floors": floors,
        "speed_ratio": min(dense_seconds) / seconds["ours"] if dense_seconds else None,
        "floor_ratio": seconds["ours"] / seconds["floor"],
        "peak_bytes": {name: peak.used for name, peak in peaks.items()},
        "memory_ratio": min(dense_bytes) / peaks["ours"].used if dense_bytes else None,
        "process_bytes": peaks["ours"].process,
    }


def _rules(options: Options, rows: int) -> list[dict[str, Any]]:
    batch = super_batch(rows, options.width)
    found = []
    for loss in ("sigmoid", "softmax"):
        exact = replace(options.policy, loss=loss)
        rounded = replace(exact, precision="bfloat16")
        select = partial(select_sub_batch, batch.learner, batch.reference)
        works: dict[str, Callable[[], object]] = {
            "float32": partial(select, exact, seed=0),
            "bfloat16": partial(select, rounded, seed=0),
            "floor": _floor(batch, options, BLOCKS[0]),
        }
        seconds = report.alternate(works, runs=options.runs)
        chosen, *others = (
            set(select(policy, seed=seed).positions.tolist()) for policy, seed in ((exact, 0), (rounded, 0), (exact, 1))
        )
        overlaps = [len(chosen & other) / len(chosen) for other in others]
        found.append(
            {
                "rows": rows,
                "loss": loss,
                "seconds": seconds,
                "floor_ratio": seconds["float32"] / seconds["floor"],
                "bfloat16_speed_ratio": seconds["float32"] / seconds["bfloat16"],
                "bfloat16_overlap": overlaps[0],
                "other_seed_overlap": overlaps[1],
            }
        )
    return found


def _prepare(name: str, rows: int, options: Options) -> Callable[[], object]:
    """Makes the inputs in the process that is to be measured."""
    return _work(name, super_batch(rows, options.width), options)


def _work(name: str, batch: SuperBatch, options: Options) -> Callable[[], object]:
    learner, reference = batch.learner, batch.reference
    boundaries = options.boundaries(len(learner))
    if name == "numpy":
        return lambda: dense.select_with_numpy(learner, reference, boundaries, np.random.default_rng(0))
    if name == "torch":
        return lambda: dense.select_with_torch(learner, reference, boundaries, torch.Generator().manual_seed(0))
    return lambda: select_sub_batch(learner, reference, options.policy, seed=0)


def _floor(batch: SuperBatch, options: Options, block: int) -> Callable[[], None]:
    """The products that no selection can do without: c x D by D x B, four for every chunk but the last.

    The products alone: what they are of was gathered before, and where they go was allocated before.
    """
    rows = len(batch.learner)
    step = min(block, rows)
    boundaries = options.boundaries(rows)
    sizes = [stop - start for start, stop in pairwise(boundaries[:-1])]
    out = torch.empty(max(sizes, default=0) * step)
    sides = [side for model in (batch.learner, batch.reference) for side in _sides(model)]
    chosen = [partners[: max(sizes, default=0)].clone() for _, partners in sides]

    def products() -> None:
        for size in sizes:
            for start in range(0, rows, step):
                for (all_rows, _), partners in zip(sides, chosen, strict=True):
                    tile = all_rows[start : start + step]
                    torch.mm(partners[:size], tile.T, out=out[: size * len(tile)].view(size, len(tile)))

    return products


def _dense_products(batch: SuperBatch) -> None:
    """The products alone of a dense implementation: B x D by D x B, one for each model, into one place."""
    rows = len(batch.learner)
    out = torch.empty(rows, rows)
    for model in (batch.learner, batch.reference):
        torch.mm(model.image, model.text.T, out=out)


def _sides(model: Embeddings) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
    return ((model.image, model.text), (model.text, model.image))


def _fits(rows: int) -> bool:
    return DENSE_BYTES_PER_PAIR * rows * rows <= SHARE_OF_MEMORY * report.free_memory()


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _mebibytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:,.0f}"
