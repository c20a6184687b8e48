"""The method again, slowly: dense float64 matrices and loops, written from the paper, sharing no code with jest_core.

A model is (image [B, D], text [B, D], scale, bias) in float64 numpy, or a matrix [B, B] of its pair losses, or a vector
[B] of its example losses. A function `LogitsOf` gives every row's logit once the rows that are chosen are named.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations

import numpy as np

Model = tuple[np.ndarray, np.ndarray, float, float]
LogitsOf = Callable[[Sequence[int]], np.ndarray]
Law = dict[tuple[int, ...], float]

SIGNS = {"learnability": (1, -1), "easy_reference": (0, -1), "hard_learner": (1, 0), "uniform": (0, 0)}


def pair_losses(model: Model | np.ndarray) -> np.ndarray:
    """The SigLIP loss of every pair: -log sigmoid(z * x), z = 1 on the diagonal and -1 elsewhere."""
    if isinstance(model, np.ndarray):
        return model
    image, text, scale, bias = model
    logits = scale * image @ text.T + bias
    signs = 2 * np.eye(len(image)) - 1
    return np.logaddexp(0, -signs * logits)


def score_matrix(scoring: str, learner: Model | np.ndarray, reference: Model | np.ndarray) -> np.ndarray:
    of_learner, of_reference = SIGNS[scoring]
    return of_learner * pair_losses(learner) + of_reference * pair_losses(reference)


def conditional_logits(
    scores: np.ndarray, chosen: Sequence[int], *, gain: float = 1.0, mean: bool = False
) -> np.ndarray:
    logits = np.diag(scores).copy()
    for k in chosen:
        logits += scores[:, k] + scores[k, :]
    return gain * logits / (1 + 2 * len(chosen) if mean else 1)


def softmax_losses(model: Model, chosen: Sequence[int]) -> np.ndarray:
    """What row i would lose under the CLIP loss if its negatives were the chosen rows; -x_ii if there are none."""
    image, text, scale, _ = model
    losses = []
    for i in range(len(image)):
        loss = -scale * image[i] @ text[i]
        if chosen:
            chosen_texts, chosen_images = text[list(chosen)], image[list(chosen)]
            loss += log_sum_exp(scale * chosen_texts @ image[i]) / 2 + log_sum_exp(scale * chosen_images @ text[i]) / 2
        losses.append(loss)
    return np.array(losses)


def log_sum_exp(values: np.ndarray) -> float:
    largest = values.max()
    return largest + math.log(math.fsum(np.exp(values - largest)))


def softmax_logits(
    scoring: str, learner: Model, reference: Model, chosen: Sequence[int], *, gain: float = 1.0
) -> np.ndarray:
    of_learner, of_reference = SIGNS[scoring]
    return gain * (of_learner * softmax_losses(learner, chosen) + of_reference * softmax_losses(reference, chosen))


def additive_worth(scores: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    """The score of each chosen row from the pairs between chosen rows."""
    return np.array([scores[i, i] + math.fsum(scores[i, k] + scores[k, i] for k in chosen if k != i) for i in chosen])


def weights(worth: np.ndarray) -> np.ndarray:
    positive = np.maximum(worth, 0)
    return positive / positive.mean() if positive.any() else np.ones(len(worth))


def boundaries(b: int, num_chunks: int) -> list[int]:
    return [(k * b) // num_chunks for k in range(num_chunks + 1)]


def chunk_sizes(b: int, num_chunks: int) -> list[int]:
    return [stop - start for start, stop in pairwise(boundaries(b, num_chunks))]


def rank_holdings(count: int, world_size: int) -> list[int]:
    """How many rows each rank has after `count` rows were dealt out, one rank after the other."""
    held = [0] * world_size
    for dealt in range(count):
        held[dealt % world_size] += 1
    return held


def rank_quotas(start: int, stop: int, world_size: int) -> list[int]:
    before, after = rank_holdings(start, world_size), rank_holdings(stop, world_size)
    return [b - a for a, b in zip(before, after, strict=True)]


@dataclass(frozen=True)
class Rules:
    """What limits a choice: each row's rank, example key and group (None: no group), and the most of one group."""

    ranks: Sequence[int]
    keys: Sequence[Hashable]
    groups: Sequence[Hashable | None]
    limit: int = 0

    @classmethod
    def for_rows(cls, size: int, **given: object) -> "Rules":
        return cls(**{"ranks": [0] * size, "keys": range(size), "groups": [None] * size, **given})

    def allowed(self, chosen: Sequence[int], taken: Sequence[int], quotas: Sequence[int]) -> list[int]:
        """The rows that may come next, after `chosen` in earlier chunks and `taken` in this one."""
        before = [*chosen, *taken]
        seen = {self.keys[row] for row in before}
        of_rank = Counter(self.ranks[row] for row in taken)
        of_group = Counter(self.groups[row] for row in before)
        return [
            row
            for row, (rank, key, group) in enumerate(zip(self.ranks, self.keys, self.groups, strict=True))
            if of_rank[rank] < quotas[rank] and key not in seen and (group is None or of_group[group] < self.limit)
        ]

    def quotas(self, start: int, stop: int) -> list[int]:
        return rank_quotas(start, stop, max(self.ranks) + 1)


def walk(order: Sequence[int], quotas: Sequence[int], rules: Rules, chosen: Sequence[int] = ()) -> list[int] | None:
    """One row after the other: take it if the rules allow it. None if a rank stays short."""
    taken: list[int] = []
    for row in order:
        if row in rules.allowed(chosen, taken, quotas):
            taken.append(row)
    return taken if len(taken) == sum(quotas) else None


def regrets(
    positions: Sequence[int], num_chunks: int, logits_of: LogitsOf, rules: Rules, seed: int | None
) -> Iterator[float]:
    """For every choice, by how much the best row that was allowed then exceeds it; with noise if there is a seed."""
    for chunk, (start, stop) in enumerate(pairwise(boundaries(len(positions), num_chunks))):
        values = logits_of(positions[:start])
        if seed is not None:
            values = values + gumbel(seed, len(values), chunk)
        for place in range(start, stop):
            allowed = rules.allowed(positions[:start], positions[start:place], rules.quotas(start, stop))
            assert positions[place] in allowed
            yield float(values[allowed].max() - values[positions[place]])


def perplexity(logits: np.ndarray) -> float:
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return float(np.exp(-sum(q * np.log(q) for q in p if q > 0)))


def draw_law(logits: np.ndarray, rows: Sequence[int], count: int) -> Law:
    """The probability of every ordered draw of `count` of `rows`, one at a time from the softmax of what is left."""
    law = {}
    for draw in permutations(rows, count):
        left, probability = list(rows), 1.0
        for row in draw:
            shares = np.exp(logits[left] - logits[left].max())
            probability *= float(shares[left.index(row)] / shares.sum())
            left.remove(row)
        law[draw] = probability
    return law


def joint_law(logits_of: LogitsOf, sizes: Sequence[int], rules: Rules) -> Law:
    """The probability of every ordered selection: rows come one at a time from the softmax of the allowed ones.

    The logits are those of the chunk's beginning. A row that a quota, a key or a group rules out leaves the softmax.
    """
    law: Law = {(): 1.0}
    for size in sizes:
        chunk: Law = {}
        for chosen, probability in law.items():
            quotas = rules.quotas(len(chosen), len(chosen) + size)
            for taken, share in _chunk_law(logits_of(chosen), chosen, quotas, rules).items():
                chunk[chosen + taken] = probability * share
        law = chunk
    return law


def _chunk_law(logits: np.ndarray, chosen: tuple[int, ...], quotas: Sequence[int], rules: Rules) -> Law:
    law: Law = {(): 1.0}
    for _ in range(sum(quotas)):
        longer: Law = {}
        for taken, probability in law.items():
            allowed = rules.allowed(chosen, taken, quotas)
            shares = np.exp(logits[allowed] - logits[allowed].max())
            for row, share in zip(allowed, shares / shares.sum(), strict=True):
                longer[(*taken, row)] = probability * float(share)
        law = longer
    return law


def of_sets(law: Law) -> dict[frozenset[int], float]:
    """The same law, of sub-batches whose order does not count."""
    sets: dict[frozenset[int], float] = {}
    for selection, probability in law.items():
        sets[frozenset(selection)] = sets.get(frozenset(selection), 0.0) + probability
    return sets


def philox_4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Salmon et al., figure 2 and section 4, on Python integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ k0, second % 2**32, (first >> 32) ^ d ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return a, b, c, d


def gumbel(seed: int, size: int, chunk: int) -> np.ndarray:
    """Each row's noise in a chunk: the middle of one of 2**52 equal parts of (0, 1), through the Gumbel quantile."""
    noise = []
    for row in range(size):
        high, low, _, _ = philox_4x32_10((row, chunk, 0, 0), (seed % 2**32, seed >> 32))
        noise.append(-math.log(-math.log((high * 2**20 + low // 2**12 + 0.5) / 2**52)))
    return np.array(noise)


def scheduled(
    step: int, *, start: float, shape: str = "constant", end: float = 0.0, steps: int = 1, warmup_steps: int = 0
) -> float:
    """A line from 0 to start in `warmup_steps` steps, then a line or half a cosine to `end` in `steps` more."""
    if step < warmup_steps:
        return start * step / warmup_steps
    if shape == "constant":
        return start
    way = min(1.0, (step - warmup_steps) / steps)
    if shape == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * way)) / 2
    return start + (end - start) * way
