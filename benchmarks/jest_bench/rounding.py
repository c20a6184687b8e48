"""What rounding the reference embeddings in the cache changes: which pairs are chosen from the same super-batch.

Run it with `python -m jest_bench rounding`. Nothing is timed: overlaps of sub-batches chosen with equal noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch

from jest_bench import report
from jest_bench.problem import super_batch
from jest_core import Embeddings, SelectionPolicy, select_sub_batch
from jest_server.domain.embedding_codec import CODECS, EmbeddingCodec

Loss = Literal["sigmoid", "softmax"]
LOSSES: Final[tuple[Loss, ...]] = ("sigmoid", "softmax")


@dataclass(frozen=True)
class Options:
    """What to look at.

    Raises:
        ValueError: If a size or the filter ratio cannot be.
    """

    sizes: tuple[int, ...] = (1024, 4096, 16384)
    width: int = 512
    filter_ratio: float = 0.8
    seeds: int = 5
    """Super-batches of each size; overlaps are means over them."""

    def __post_init__(self) -> None:
        for size in self.sizes:
            SelectionPolicy(filter_ratio=self.filter_ratio).resolve_sub_batch_size(size)


def measure(options: Options) -> dict[str, Any]:
    """Returns the overlaps for every size and loss."""
    return {
        "machine": report.machine(),
        "seeds": options.seeds,
        "rows": [_overlaps(options, rows, loss) for rows in options.sizes for loss in LOSSES],
    }


def tables(result: dict[str, Any]) -> str:
    """Renders the result as a Markdown table."""
    header = ["B", "loss", "int8 cache", "f16 cache", "another seed", "B in bytes, f16", "int8"]
    return report.markdown(
        header,
        [
            [
                f"{row['rows']:,}",
                row["loss"],
                *(f"{row['overlaps'][name]:.1%}" for name in ("int8", "float16", "other_seed")),
                *(f"{row['bytes'][name]:,}" for name in ("float16", "int8")),
            ]
            for row in result["rows"]
        ],
    )


def _overlaps(options: Options, rows: int, loss: Loss) -> dict[str, Any]:
    policy = SelectionPolicy(filter_ratio=options.filter_ratio, loss=loss)
    found: dict[str, list[float]] = {"int8": [], "float16": [], "other_seed": []}
    for seed in range(options.seeds):
        batch = super_batch(rows, options.width, seed=seed)

        def choose(reference: Embeddings, seed: int, learner: Embeddings = batch.learner) -> set[int]:
            return set(select_sub_batch(learner, reference, policy, seed=seed).positions.tolist())

        exact = choose(batch.reference, seed)
        others = {"other_seed": choose(batch.reference, seed + options.seeds)}
        others |= {precision: choose(_cached(batch.reference, codec), seed) for precision, codec in CODECS.items()}
        for name, chosen in others.items():
            found[name].append(len(exact & chosen) / len(exact))
    return {
        "rows": rows,
        "loss": loss,
        "overlaps": {name: float(np.mean(values)) for name, values in found.items()},
        "bytes": {precision: rows * codec.value_bytes(options.width) for precision, codec in CODECS.items()},
    }


def _cached(reference: Embeddings, codec: EmbeddingCodec) -> Embeddings:
    """The embeddings as they come out of a cache."""
    pairs = torch.stack((reference.image, reference.text), dim=1).to(torch.float16).numpy()
    width = pairs.shape[2]
    values = codec.decode(codec.encode([pair.tobytes() for pair in pairs], width), width)
    image, text = torch.from_numpy(np.frombuffer(b"".join(values), np.float16).reshape(pairs.shape).copy()).unbind(1)
    return Embeddings(image, text, reference.scale, reference.bias)
