"""Joint example selection (arXiv 2406.17711, algorithm 1): a sub-batch grown in chunks, each sampled given the last.

Shapes: B = super-batch, b = sub-batch, N = chunks, c = rows of one chunk, D = embedding width.

Products are float32 under the process's `torch.set_float32_matmul_precision`. Embeddings in 16 bits are exact
in TF32 as well, so TF32 matters for float32 embeddings only.
"""

from collections.abc import Hashable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from jest_core.counter_rng import require_seed
from jest_core.inputs import SignedModels, candidate_pool, chosen_rows, resolve_super_batch_size, signed_models
from jest_core.policy import SelectionPolicy
from jest_core.sampling import CandidatePool, order_by_gumbel, order_by_logit, perplexity, rank_quotas
from jest_core.scores import SigmoidScores
from jest_core.types import Embeddings, Selection


def select_sub_batch(
    learner: Embeddings | None,
    reference: Embeddings | None,
    policy: SelectionPolicy,
    *,
    seed: int,
    example_keys: Sequence[Hashable] | Tensor | None = None,
    rank_of_row: Tensor | None = None,
    super_batch_size: int | None = None,
) -> Selection:
    """Choose b of B rows, jointly.

    Work O(B * b * D) on the device of the embeddings; memory O(B) and a few MiB of buffers beside them. The same
    inputs and seed give the same answer. Another device can round logits differently in their last bits, which
    exchanges rows only where two noisy logits are that close.

    Args:
        learner: the learner's embeddings; None if the scoring does without.
        reference: the reference model's embeddings of the same rows; None if the scoring does without.
            Width, dtype, scale and bias may differ from the learner's.
        policy: the selection rule.
        seed: 64 unsigned bits, see `selection_seed`.
        example_keys: which example each row is: B hashable values or an int64 tensor [B]; None if no row
            is a duplicate. At most one row of an example is chosen.
        rank_of_row: int64 [B], which rank holds each row, every rank from 0 to W - 1 present; None for one rank.
        super_batch_size: B, for when no embeddings are given.

    Raises:
        ValueError: an input does not fit the others or the policy, or there are too few distinct examples,
            in all or for one rank.
    """
    require_seed("seed", seed)
    models = signed_models(learner, reference, policy)
    size = resolve_super_batch_size(learner, reference, super_batch_size)
    sub_batch_size = policy.resolve_sub_batch_size(size)
    device = models[0][0].image.device if models else torch.device("cpu")
    pool = candidate_pool(policy, size, example_keys, rank_of_row, device)
    with torch.no_grad():
        return _grow(models, policy, pool, chunk_boundaries(sub_batch_size, policy.num_chunks), seed)


def conditional_logits(
    learner: Embeddings | None,
    reference: Embeddings | None,
    policy: SelectionPolicy,
    chosen: Sequence[int] | Tensor,
    *,
    super_batch_size: int | None = None,
) -> Tensor:
    """Every row's logit given the rows `chosen` already: gain * (S_ii + sum over chosen k of (S_ik + S_ki)).

    float32 [B], before noise and masking; with normalization "mean" divided by 1 + 2 * len(chosen). For a row that
    is itself chosen, its own term in the sum is S_ii, twice. Work O(B * len(chosen) * D).

    Raises:
        ValueError: an input does not fit the others, or `chosen` is not a set of distinct rows.
    """
    models = signed_models(learner, reference, policy)
    size = resolve_super_batch_size(learner, reference, super_batch_size)
    chosen_c = chosen_rows(chosen, size)
    if not models:
        return torch.zeros(size)
    device = models[0][0].image.device
    rows_B = torch.arange(size, device=device)
    with torch.no_grad():
        scores = SigmoidScores(models, max_chosen=len(chosen_c))
        scores.add_chosen(chosen_c.to(device), rows_B)
        return _logits(scores.sums(rows_B), policy, len(chosen_c))


def chunk_boundaries(sub_batch_size: int, num_chunks: int) -> tuple[int, ...]:
    """N + 1 offsets from 0 to b that cut it into chunks whose sizes differ by at most one."""
    return tuple(chunk * sub_batch_size // num_chunks for chunk in range(num_chunks + 1))


def _grow(
    models: SignedModels, policy: SelectionPolicy, pool: CandidatePool, boundaries: tuple[int, ...], seed: int
) -> Selection:
    chunks = list(pairwise(boundaries))
    # Nothing is chosen after the last chunk, so nothing has to be scored for it.
    largest = max((stop - start for start, stop in chunks[:-1]), default=0)
    scores = SigmoidScores(models, max_chosen=largest) if models else None
    positions, perplexities = [], []
    rows = pool.rows()
    for chunk, (start, stop) in enumerate(chunks):
        sums = scores.sums(rows) if scores else torch.zeros(len(rows), dtype=torch.float64)
        logits = _logits(sums, policy, start)
        perplexities.append(perplexity(logits))
        if policy.sampler == "gumbel":
            ordered = order_by_gumbel(logits, rows, seed=seed, chunk=chunk)
        else:
            ordered = order_by_logit(logits, rows)
        taken = pool.take(ordered, rank_quotas(start, stop, pool.world_size))
        positions.append(taken)
        rows = pool.rows()
        if scores and stop < boundaries[-1]:
            scores.add_chosen(taken, rows)
    return Selection(
        positions=torch.cat(positions).cpu(),
        chunk_boundaries=boundaries,
        perplexity=tuple(torch.stack(perplexities).tolist()),
    )


def _logits(sums: Tensor, policy: SelectionPolicy, num_chosen: int) -> Tensor:
    terms = 1 + 2 * num_chosen if policy.normalization == "mean" else 1
    logits = (sums * (policy.gain / terms)).float()
    if not bool(logits.isfinite().all()):
        raise ValueError("logits overflow float32: the embeddings, a scale, a bias or the gain are too large")
    return logits
