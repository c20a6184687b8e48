"""The accounts of one loop: what selection cost this process, beside what it saved."""

from __future__ import annotations

from dataclasses import dataclass, replace


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


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where the seconds of one step went; the contract's StepTimes tells what each is."""

    load: float
    embed: float
    select: float
    train: float


class StepClock:
    """Cuts a loop's time into steps, each from one call for a decision to the next."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._began: float | None = None
        self._before = replace(stats)

    def step(self, now: float) -> StepTimes | None:
        """Ends a step and begins the next; None if it was the first, which began before anyone looked."""
        began, before, stats = self._began, self._before, self._stats
        self._began, self._before = now, replace(stats)
        if began is None:
            return None
        load = stats.submit_wait_seconds - before.submit_wait_seconds
        embed = stats.embed_seconds - before.embed_seconds
        select = stats.select_seconds - before.select_seconds
        return StepTimes(load, embed, select, max(0.0, now - began - load - embed - select))
