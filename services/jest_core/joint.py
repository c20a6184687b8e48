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
from jest_core.inputs import candidate_pool, chosen_rows, resolve_super_batch_size, signed_models
from jest_core.policy import SelectionPolicy
from jest_core.sampling import CandidatePool, order_by_gumbel, order_by_logit, perplexity, rank_quotas
from jest_core.schedules import Schedule
from jest_core.scores import Scores, scores_of
from jest_core.types import ModelOutputs, Selection
from jest_core.workers import Workers


def select_sub_batch(
    learner: ModelOutputs | None,
    reference: ModelOutputs | None,
    policy: SelectionPolicy,
    *,
    seed: int,
    example_keys: Sequence[Hashable] | Tensor | None = None,
    rank_of_row: Tensor | None = None,
    group_labels: Sequence[Hashable] | Tensor | None = None,
    super_batch_size: int | None = None,
) -> Selection:
    """Choose b of B rows, jointly.

    Work O(B * b * D) on the device of the embeddings; memory O(B) and a few MiB of buffers beside them, and
    8 * B * D bytes for each model whose embeddings have 16 bits. The same inputs and seed give the same answer.
    Another device can round logits differently in their last bits, which exchanges rows only where two noisy logits
    are that close.

    Args:
        learner: the learner's embeddings, or its losses under the losses `pairwise` and `per_example`; None if the
            scoring does without.
        reference: the reference model's embeddings of the same rows, or its losses likewise; None if the
            scoring does without. Width, dtype, scale and bias may differ from the learner's.
        policy: the selection rule, without schedules.
        seed: 64 unsigned bits, see `selection_seed`.
        example_keys: which example each row is: B hashable values or an int64 tensor [B]; None if no row
            is a duplicate. At most one row of an example is chosen.
        rank_of_row: int64 [B], which rank holds each row, every rank from 0 to W - 1 present; None for one rank.
        group_labels: which group each row belongs to, for the policy's `max_per_group`: B hashable values, None for
            a row of no group, or an int64 tensor [B].
        super_batch_size: B, for when no model's outputs are given.

    Raises:
        ValueError: an input does not fit the others or the policy, the policy depends on a step, or there are too
            few rows that example keys, groups and ranks allow.
    """
    policy.require_unscheduled()
    require_seed("seed", seed)
    models = signed_models(learner, reference, policy)
    size = resolve_super_batch_size(learner, reference, super_batch_size)
    sub_batch_size = policy.resolve_sub_batch_size(size)
    device = models[0][0].device if models else torch.device("cpu")
    pool = candidate_pool(policy, size, example_keys, rank_of_row, group_labels, device)
    boundaries = chunk_boundaries(sub_batch_size, policy.num_chunks)
    with Workers(device) as workers:

        def select() -> Selection:
            scores = scores_of(models, policy, size, workers)
            own_B = scores.sums(torch.arange(size, device=device))
            positions, perplexities = _grow(scores, policy, pool, boundaries, seed)
            return Selection(
                positions=positions.cpu(),
                chunk_boundaries=boundaries,
                perplexity=tuple(perplexities.tolist()),
                weights=_weights(scores, positions).cpu() if policy.weights else None,
                mean_own_scores=_means(own_B, positions),
            )

        return workers.run(select)


def conditional_logits(
    learner: ModelOutputs | None,
    reference: ModelOutputs | None,
    policy: SelectionPolicy,
    chosen: Sequence[int] | Tensor,
    *,
    super_batch_size: int | None = None,
) -> Tensor:
    """Every row's logit given the rows `chosen` already: gain * (S_ii + sum over chosen k of (S_ik + S_ki)).

    float32 [B], before noise and masking; with normalization "mean" divided by 1 + 2 * len(chosen). For a row that
    is itself chosen, its own term in the sum is S_ii, twice. Under the softmax loss it is gain * (-x_ii + half the
    log-sum-exps of the row's logits with the chosen texts and images), without the latter while nothing is chosen.
    Work O(B * len(chosen) * D).

    Raises:
        ValueError: an input does not fit the others, or `chosen` is not a set of distinct rows.
    """
    policy.require_unscheduled()
    models = signed_models(learner, reference, policy)
    size = resolve_super_batch_size(learner, reference, super_batch_size)
    chosen_c = chosen_rows(chosen, size)
    device = models[0][0].device if models else torch.device("cpu")
    rows_B = torch.arange(size, device=device)
    with Workers(device) as workers:

        def logits() -> Tensor:
            scores = scores_of(models, policy, size, workers)
            scores.add_chosen(chosen_c.to(device), rows_B)
            return _logits(scores, policy, rows_B, len(chosen_c))

        return workers.run(logits)


def chunk_boundaries(sub_batch_size: int, num_chunks: int) -> tuple[int, ...]:
    """N + 1 offsets from 0 to b that cut it into chunks whose sizes differ by at most one."""
    return tuple(chunk * sub_batch_size // num_chunks for chunk in range(num_chunks + 1))


def _grow(
    scores: Scores, policy: SelectionPolicy, pool: CandidatePool, boundaries: tuple[int, ...], seed: int
) -> tuple[Tensor, Tensor]:
    positions, perplexities = [], []
    rows = pool.rows()
    for chunk, (start, stop) in enumerate(pairwise(boundaries)):
        logits = _logits(scores, policy, rows, start)
        perplexities.append(perplexity(logits))
        if policy.sampler == "gumbel":
            ordered = order_by_gumbel(logits, rows, seed=seed, chunk=chunk)
        else:
            ordered = order_by_logit(logits, rows)
        taken = pool.take(ordered, rank_quotas(start, stop, pool.world_size))
        positions.append(taken)
        rows = pool.rows()
        if stop < boundaries[-1]:  # nothing is chosen after the last chunk, so nothing has to be scored for it
            scores.add_chosen(taken, rows)
    return torch.cat(positions), torch.stack(perplexities)


def _logits(scores: Scores, policy: SelectionPolicy, rows: Tensor, num_chosen: int) -> Tensor:
    assert not isinstance(policy.gain, Schedule)
    terms = scores.num_terms(num_chosen) if policy.normalization == "mean" else 1
    return _require_finite((scores.sums(rows) * (policy.gain / terms)).float())


def _weights(scores: Scores, positions: Tensor) -> Tensor:
    worth_b = _require_finite(scores.among(positions).float()).double().clamp_(min=0)
    mean = worth_b.mean()
    return torch.where(mean > 0, worth_b / mean, torch.ones_like(worth_b)).float()


def _means(own_B: Tensor, positions: Tensor) -> tuple[float, float]:
    dropped_B = torch.ones_like(own_B, dtype=torch.bool)
    dropped_B[positions] = False
    return float(own_B[positions].mean()), float(own_B[dropped_B].mean())


def _require_finite(values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        raise ValueError("logits overflow float32: the embeddings, a scale, a bias, a loss or the gain are too large")
    return values
