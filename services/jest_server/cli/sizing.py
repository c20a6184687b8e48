"""What a deployment needs, by the cost model of docs/operations.md: no measurement, arithmetic on what is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from jest_server.domain.embedding_codec import CODECS, Precision

if TYPE_CHECKING:
    from collections.abc import Sequence

CACHE_OVERHEAD_BYTES = 130
"""What a cached example takes beside its value: its key of some 60 bytes and Valkey's own bookkeeping, as measured."""
BUSY = 0.7
"""How much of a device is planned to be in use; beyond that, waiting times grow."""


@dataclass(frozen=True)
class Load:
    """Jobs of one kind.

    Attributes:
        jobs: Training jobs at the same time.
        data_sets: Different streams of examples among them; jobs over the same data share its inferences.
        sub_batch: Examples that each step trains on.
        filter_ratio: Share of a super-batch that is left out.
        num_chunks: Chunks in which a sub-batch grows.
        width: Width of learner and reference embeddings.
        steps_per_s: Steps of each job in a second.
        examples: Examples of each data set.
        cached: Share of the examples whose reference embeddings are there already.
        feature_bytes: Size of an example's features as they are uploaded; 0 where scorers read them by reference.
        precision: How the cache holds embeddings.
        reference_examples_per_s: What one Triton replica embeds in a second.
        selector_flops: Floating-point operations that one selector does in a second.

    Raises:
        ValueError: If a value cannot be.
    """

    jobs: int = 1
    data_sets: int = 1
    sub_batch: int = 4096
    filter_ratio: float = 0.8
    num_chunks: int = 16
    width: int = 768
    steps_per_s: float = 1.0
    examples: int = 100_000_000
    cached: float = 0.9
    feature_bytes: int = 0
    precision: Precision = "float16"
    reference_examples_per_s: float = 2_000.0
    selector_flops: float = 10e12

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in {"filter_ratio", "cached"}:
                if not 0 <= value <= 1 or (field.name == "filter_ratio" and value == 1):
                    raise ValueError(f"{field.name} is {value}, expected a share from 0 to 1")
            elif field.name == "feature_bytes":
                if value < 0:
                    raise ValueError(f"feature_bytes is {value}, expected at least 0")
            elif field.name == "precision":
                if value not in CODECS:
                    raise ValueError(f"precision is {value!r}, expected one of {', '.join(CODECS)}")
            elif not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field.name} is {value}, expected more than 0")
        if self.data_sets > self.jobs:
            raise ValueError(f"data_sets is {self.data_sets}, expected at most the number of jobs, {self.jobs}")


@dataclass(frozen=True)
class Needs:
    """What a load needs: counts, bytes, and seconds as the names say."""

    super_batch: int
    learner_bytes_per_step: int
    """From the trainer to the selector: two float16 embeddings of each row."""
    upload_bytes_per_step: int
    """From the trainer through the selector and the queue to a scorer: the features of what is not cached."""
    reference_bytes_per_step: int
    """From the cache to the selector."""
    inferences_per_s: float
    triton_replicas: int
    replica_hours_per_data_set: float
    """What embedding a whole data set once takes, however many jobs use it."""
    cache_bytes: int
    """For all data sets, whole."""
    select_s: float
    """The products of one selection."""
    selectors: int


def needs_of(load: Load) -> Needs:
    """Applies the cost model."""
    rows = math.ceil(load.sub_batch / (1 - load.filter_ratio) - 1e-6)
    value = CODECS[load.precision].value_bytes(load.width)
    new = rows * (1 - load.cached)
    inferences_per_s = new * load.steps_per_s * load.data_sets
    # Rows against chosen pairs, both directions, of both models; the first chunk has none to be compared with.
    operations = 8 * rows * load.sub_batch * load.width * (1 - 1 / load.num_chunks)
    select_s = operations / load.selector_flops
    return Needs(
        super_batch=rows,
        learner_bytes_per_step=rows * 2 * load.width * 2,
        upload_bytes_per_step=round(new * load.feature_bytes),
        reference_bytes_per_step=rows * value,
        inferences_per_s=inferences_per_s,
        triton_replicas=max(1, math.ceil(inferences_per_s / (BUSY * load.reference_examples_per_s) - 1e-6)),
        replica_hours_per_data_set=load.examples / load.reference_examples_per_s / 3600,
        cache_bytes=load.data_sets * load.examples * (value + CACHE_OVERHEAD_BYTES),
        select_s=select_s,
        selectors=max(1, math.ceil(load.jobs * load.steps_per_s * select_s / BUSY - 1e-6)),
    )


def table(loads: Sequence[Load]) -> str:
    """Returns a Markdown table, a row for each load."""
    columns = (
        "jobs",
        "data sets",
        "super-batch",
        "Triton replicas",
        "replica-hours for each data set",
        "cache",
        "selectors",
        "a selection's products",
        "learner → selector, each step",
        "uploaded, each step",
        "cache → selector, each step",
    )
    lines = ["| " + " | ".join(columns) + " |", "|" + " --: |" * len(columns)]
    for load in loads:
        needs = needs_of(load)
        cells = (
            f"{load.jobs:,}",
            f"{load.data_sets:,}",
            f"{needs.super_batch:,}",
            f"{needs.triton_replicas:,}",
            f"{needs.replica_hours_per_data_set:.1f}",
            _bytes(needs.cache_bytes),
            f"{needs.selectors:,}",
            f"{needs.select_s:.3f} s",
            _bytes(needs.learner_bytes_per_step),
            _bytes(needs.upload_bytes_per_step),
            _bytes(needs.reference_bytes_per_step),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
