"""The accounts of one loop: what selection cost this process, beside what it saved."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from jest_trainer._rpc.wire import StepTimes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jest_trainer.results import SubBatch

Phase = Literal["submit_wait_seconds", "embed_seconds", "select_seconds"]


@dataclass(slots=True)
class Stats:
    """Sums since the loop was made.

    Attributes:
        examples_loaded: rows that this rank loaded, in super-batches that got a decision or were dead-lettered.
        examples_trained: rows of them that this rank was given to train on.
        super_batches: decisions received.
        cache_hits: rows of these super-batches, all ranks together, whose reference embeddings were cached.
        reference_inferences: examples, all ranks together, that the reference model had to embed for them.
        submit_wait_seconds: waiting for the next super-batch to be loaded and submitted.
        embed_seconds: in the learner's forward passes over super-batches.
        select_seconds: sending what the learner made of them and waiting for decisions.
        fallbacks: decisions that used the job's fallback.
        dead_lettered: super-batches that got no decision and were skipped.
        perplexity: of the last decision, the mean over its chunks; NaN before the first.
    """

    examples_loaded: int = 0
    examples_trained: int = 0
    super_batches: int = 0
    cache_hits: int = 0
    reference_inferences: int = 0
    submit_wait_seconds: float = 0.0
    embed_seconds: float = 0.0
    select_seconds: float = 0.0
    fallbacks: int = 0
    dead_lettered: int = 0
    perplexity: float = float("nan")


class Accounts:
    """Keeps a loop's `stats`, and cuts each pass into steps: from one call for a decision to the next."""

    def __init__(self) -> None:
        self.stats = Stats()
        self.begin_pass()

    def begin_pass(self) -> None:
        """Forget the step that was under way when the last pass was left."""
        self._step_began: float | None = None
        self._before = replace(self.stats)

    @contextmanager
    def timing(self, phase: Phase) -> Iterator[None]:
        """Add the block's duration to a phase, also if it raises."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self.stats, phase, getattr(self.stats, phase) + time.perf_counter() - began)

    def end_step(self) -> StepTimes | None:
        """End a step and begin the next; return None for the first of a pass, whose beginning was not measured."""
        now, stats = time.perf_counter(), self.stats
        began, before = self._step_began, self._before
        self._step_began, self._before = now, replace(stats)
        if began is None:
            return None
        load = stats.submit_wait_seconds - before.submit_wait_seconds
        embed = stats.embed_seconds - before.embed_seconds
        select = stats.select_seconds - before.select_seconds
        return StepTimes(load, embed, select, max(0.0, now - began - load - embed - select))

    def count_decision(self, rows: int, decision: SubBatch) -> None:
        """Count a super-batch of which this rank loaded `rows` rows."""
        stats = self.stats
        stats.super_batches += 1
        stats.examples_loaded += rows
        stats.examples_trained += len(decision.positions)
        stats.cache_hits += decision.cache_hits
        stats.reference_inferences += decision.reference_inferences
        stats.fallbacks += decision.fallback is not None
        if decision.perplexity:
            stats.perplexity = sum(decision.perplexity) / len(decision.perplexity)

    def count_dead_letter(self, rows: int) -> None:
        """Count a super-batch of which this rank loaded `rows` rows for nothing."""
        self.stats.dead_lettered += 1
        self.stats.examples_loaded += rows
