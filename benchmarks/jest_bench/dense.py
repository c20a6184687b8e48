"""What the selection is measured against: the published algorithm on a dense B x B matrix, written well.

The learnability matrix (arXiv 2406.17711, section 2.2) is built once, in place, with one matrix product for each model;
every chunk then adds the rows and columns of what it chose. Nothing here is slower than it has to be.

Shapes: B = super-batch, b = sub-batch, D = embedding width.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from jest_core import Embeddings

LARGEST_EXPONENT = 80.0
"""Up to here exp() is finite in float32, and softplus may be log1p(exp(x))."""


def select_with_numpy(
    learner: Embeddings, reference: Embeddings, boundaries: Sequence[int], rng: np.random.Generator | None
) -> NDArray[np.int64]:
    """Choose a sub-batch in NumPy. Memory 8 * B * B bytes, work O(B * B * D).

    Args:
        learner: float32 on the CPU.
        reference: likewise.
        boundaries: offsets of the chunks, from 0 to b.
        rng: for sampling; None takes the largest logits.
    """
    scores_BB = _pair_losses_numpy(learner)
    scores_BB -= _pair_losses_numpy(reference)
    logits_B = scores_BB.diagonal().copy()
    is_chosen_B = np.zeros(len(logits_B), dtype=bool)
    chunks = []
    for start, stop in pairwise(boundaries):
        perturbed_B = logits_B if rng is None else logits_B + rng.gumbel(size=len(logits_B)).astype(np.float32)
        perturbed_B = np.where(is_chosen_B, -np.inf, perturbed_B)
        best_c = np.argpartition(perturbed_B, -(stop - start))[-(stop - start) :]
        is_chosen_B[best_c] = True
        chunks.append(best_c)
        if stop < boundaries[-1]:
            logits_B += scores_BB[best_c].sum(axis=0)
            logits_B += scores_BB[:, best_c].sum(axis=1)
    return np.concatenate(chunks)


def select_with_torch(
    learner: Embeddings, reference: Embeddings, boundaries: Sequence[int], generator: torch.Generator | None
) -> torch.Tensor:
    """Choose a sub-batch in PyTorch. Memory 8 * B * B bytes, work O(B * B * D).

    Args:
        learner: float32.
        reference: likewise.
        boundaries: offsets of the chunks, from 0 to b.
        generator: for sampling; None takes the largest logits.
    """
    with torch.no_grad():
        scores_BB = _pair_losses_torch(learner)
        scores_BB -= _pair_losses_torch(reference)
        logits_B = scores_BB.diagonal().clone()
        is_chosen_B = torch.zeros(len(logits_B), dtype=torch.bool)
        chunks = []
        for start, stop in pairwise(boundaries):
            perturbed_B = logits_B.clone()
            if generator is not None:
                perturbed_B -= torch.empty_like(logits_B).exponential_(generator=generator).log_()
            best_c = perturbed_B.masked_fill_(is_chosen_B, -torch.inf).topk(stop - start).indices
            is_chosen_B[best_c] = True
            chunks.append(best_c)
            if stop < boundaries[-1]:
                logits_B += scores_BB[best_c].sum(dim=0)
                logits_B += scores_BB[:, best_c].sum(dim=1)
        return torch.cat(chunks)


def _pair_losses_numpy(model: Embeddings) -> NDArray[np.float32]:
    """Every pair's sigmoid loss, [B, B]."""
    logits_BB: NDArray[np.float32] = (model.image.numpy() * np.float32(model.scale)) @ model.text.numpy().T
    logits_BB += np.float32(model.bias)
    matching_B = logits_BB.diagonal().copy()
    if logits_BB.max() < LARGEST_EXPONENT:
        np.log1p(np.exp(logits_BB, out=logits_BB), out=logits_BB)
    else:
        np.logaddexp(logits_BB, np.float32(0), out=logits_BB)
    # softplus(-x) = softplus(x) - x
    logits_BB.flat[:: len(logits_BB) + 1] -= matching_B
    return logits_BB


def _pair_losses_torch(model: Embeddings) -> torch.Tensor:
    """Every pair's sigmoid loss, [B, B]."""
    logits_BB = torch.addmm(torch.tensor(model.bias), model.image, model.text.T, alpha=model.scale)
    matching_B = logits_BB.diagonal().clone()
    torch.logaddexp(logits_BB, torch.zeros(()), out=logits_BB)
    logits_BB.diagonal().sub_(matching_B)
    return logits_BB
