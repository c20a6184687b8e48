"""The method again, slowly: dense float64 matrices and loops, written from the paper, sharing no code with jest_core.

A model is (image [B, D], text [B, D], scale, bias) in float64 numpy.
"""

from collections.abc import Hashable, Sequence
from itertools import pairwise, permutations

import numpy as np

Model = tuple[np.ndarray, np.ndarray, float, float]


def pair_losses(model: Model) -> np.ndarray:
    """The SigLIP loss of every pair: -log sigmoid(z * x), z = 1 on the diagonal and -1 elsewhere."""
    image, text, scale, bias = model
    logits = scale * image @ text.T + bias
    signs = 2 * np.eye(len(image)) - 1
    return np.logaddexp(0, -signs * logits)


def score_matrix(scoring: str, learner: Model, reference: Model) -> np.ndarray:
    match scoring:
        case "learnability":
            return pair_losses(learner) - pair_losses(reference)
        case "easy_reference":
            return -pair_losses(reference)
        case "hard_learner":
            return pair_losses(learner)
        case "uniform":
            return np.zeros((len(learner[0]), len(learner[0])))
    raise AssertionError(scoring)


def conditional_logits(
    scores: np.ndarray, chosen: Sequence[int], *, gain: float = 1.0, mean: bool = False
) -> np.ndarray:
    logits = np.diag(scores).copy()
    for k in chosen:
        logits += scores[:, k] + scores[k, :]
    return gain * logits / (1 + 2 * len(chosen) if mean else 1)


def chunk_sizes(b: int, num_chunks: int) -> list[int]:
    ends = [(k * b) // num_chunks for k in range(num_chunks + 1)]
    return [stop - start for start, stop in pairwise(ends)]


def rank_holdings(count: int, world_size: int) -> list[int]:
    """How many rows each rank has after `count` rows were dealt out, one rank after the other."""
    held = [0] * world_size
    for dealt in range(count):
        held[dealt % world_size] += 1
    return held


def walk(
    order: Sequence[int], quotas: Sequence[int], ranks: Sequence[int], keys: Sequence[Hashable]
) -> list[int] | None:
    """One row after the other: take it if its rank still wants rows and its key is new. None if a rank stays short."""
    left, seen, taken = list(quotas), set(), []
    for row in order:
        if left[ranks[row]] > 0 and keys[row] not in seen:
            left[ranks[row]] -= 1
            seen.add(keys[row])
            taken.append(row)
    return taken if not any(left) else None


def perplexity(logits: np.ndarray) -> float:
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return float(np.exp(-sum(q * np.log(q) for q in p if q > 0)))


def draw_law(logits: np.ndarray, rows: Sequence[int], count: int) -> dict[tuple[int, ...], float]:
    """The probability of every ordered draw of `count` of `rows`, one at a time from the softmax of what is left."""
    law = {}
    for draw in permutations(rows, count):
        left, probability = list(rows), 1.0
        for row in draw:
            weights = np.exp(logits[left] - logits[left].max())
            probability *= float(weights[left.index(row)] / weights.sum())
            left.remove(row)
        law[draw] = probability
    return law


def joint_law(scores: np.ndarray, sizes: Sequence[int], chosen: tuple[int, ...] = ()) -> dict[tuple[int, ...], float]:
    """The probability of every ordered selection that grows by `sizes`, each chunk given the ones before it."""
    if not sizes:
        return {chosen: 1.0}
    rows = [row for row in range(len(scores)) if row not in chosen]
    law = {}
    for draw, probability in draw_law(conditional_logits(scores, chosen), rows, sizes[0]).items():
        for selection, rest in joint_law(scores, sizes[1:], chosen + draw).items():
            law[selection] = probability * rest
    return law


def philox_4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Salmon et al., figure 2 and section 4, on Python integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ k0, second % 2**32, (first >> 32) ^ d ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return a, b, c, d
