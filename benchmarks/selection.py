"""Times one selection against the dense way of doing the same, side by side in one run.

Run it with `make bench`. The dense rival is written as one would write it well: the B×B learnability matrix is built
once with two matrix products and in-place softplus, then each chunk adds the columns and rows of what it chose. Every
measurement runs in a process of its own, so that peak memory means something; the two alternate, medians are printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch.nn import functional

from jest_core import Embeddings, SelectionPolicy, select_sub_batch

FILTER_RATIO = 0.8


def main() -> None:
    """Prints a table, or JSON lines with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.sizes[0], options.width, options.chunks)))
        return
    if not options.json:
        print(f"f = {FILTER_RATIO}, N = {options.chunks}, D = {options.width}, fp32, {torch.get_num_threads()} threads")
        print(f"{'B':>7} {'dense s':>9} {'ours s':>9} {'ratio':>7} {'dense MiB':>10} {'ours MiB':>9} {'ratio':>7}")
    for size in options.sizes:
        runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for _ in range(options.runs):
            for method, results in runs.items():
                results.append(in_a_process(method, size, options))
        row = {
            f"{method}_{key}": statistics.median(result[key] for result in results)
            for method, results in runs.items()
            for key in ("seconds", "mebibytes")
        }
        speed, memory = (row[f"dense_{key}"] / row[f"ours_{key}"] for key in ("seconds", "mebibytes"))
        if options.json:
            print(json.dumps({"super_batch": size, **row, "speed_ratio": speed, "memory_ratio": memory}))
        else:
            print(
                f"{size:>7} {row['dense_seconds']:>9.3f} {row['ours_seconds']:>9.3f} {speed:>7.2f} "
                f"{row['dense_mebibytes']:>10.0f} {row['ours_mebibytes']:>9.0f} {memory:>7.2f}"
            )


def in_a_process(method: str, size: int, options: argparse.Namespace) -> dict[str, float]:
    """Measures once, in a fresh process."""
    command = [sys.executable, __file__, "--one", method, "--sizes", str(size)]
    command += ["--width", str(options.width), "--chunks", str(options.chunks)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - our own arguments
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure(method: str, size: int, width: int, chunks: int) -> dict[str, float]:
    """Returns seconds of the second call, and the peak memory that the calls added."""
    learner, reference = (random_embeddings(size, width, seed) for seed in (1, 2))
    policy = SelectionPolicy(filter_ratio=FILTER_RATIO, num_chunks=chunks)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    METHODS[method](learner, reference, policy)
    started = time.perf_counter()
    METHODS[method](learner, reference, policy)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "mebibytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def random_embeddings(size: int, width: int, seed: int) -> Embeddings:
    """Makes unit vectors whose pairs match a little, as a half-trained model's do."""
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, size, width, generator=generator)
    normalize = functional.normalize
    return Embeddings(normalize(image, dim=1), normalize(text + image, dim=1), scale=10.0, bias=-10.0)


def ours(learner: Embeddings, reference: Embeddings, policy: SelectionPolicy) -> None:
    """Selects with jest_core."""
    select_sub_batch(learner, reference, policy, seed=3)


def dense(learner: Embeddings, reference: Embeddings, policy: SelectionPolicy) -> None:
    """Selects from the full learnability matrix."""
    scores = pair_losses(learner)
    scores -= pair_losses(reference)
    size = len(learner)
    boundaries = [k * policy.resolve_sub_batch_size(size) // policy.num_chunks for k in range(policy.num_chunks + 1)]
    logits = scores.diagonal().clone()
    generator = torch.Generator().manual_seed(3)
    for start, end in itertools.pairwise(boundaries):
        gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
        chosen = (logits + gumbel).topk(end - start).indices
        logits += scores[:, chosen].sum(1)
        logits += scores[chosen].sum(0)
        logits[chosen] = -torch.inf


def pair_losses(model: Embeddings) -> torch.Tensor:
    """Returns the B×B sigmoid pair losses: softplus(-x) on the diagonal, softplus(x) elsewhere."""
    logits = model.image @ model.text.T
    logits.mul_(model.scale).add_(model.bias)
    logits.diagonal().neg_()
    return functional.softplus(logits)


METHODS = {"dense": dense, "ours": ours}

if __name__ == "__main__":
    main()
