"""Which rows a chunk takes: the best-ranked ones that quotas and example keys still allow.

Adding Gumbel noise to logits and taking the top c is exactly sampling c times from their softmax without
replacement (Kool et al., arXiv 1903.06059, section 2). Duplicates of one example are false negatives
of each other, so at most one of them is ever taken.

Shapes: B = super-batch, n = rows in order of preference, W = ranks.
"""

import torch
from torch import Tensor

from jest_core.counter_rng import gumbel_noise


def order_by_gumbel(logits_n: Tensor, rows_n: Tensor, *, seed: int, chunk: int) -> Tensor:
    """`rows_n`, in the order in which softmax sampling without replacement would draw them."""
    perturbed_n = logits_n.double() + gumbel_noise(seed, rows_n, chunk)
    return rows_n[torch.sort(perturbed_n, descending=True, stable=True).indices]


def order_by_logit(logits_n: Tensor, rows_n: Tensor) -> Tensor:
    """`rows_n` from the largest logit down, equal ones as they came."""
    return rows_n[torch.sort(logits_n, descending=True, stable=True).indices]


def perplexity(logits_n: Tensor) -> Tensor:
    """The exponential of the Shannon entropy of softmax(logits), a 0-d float64 tensor."""
    log_p_n = torch.log_softmax(logits_n.double(), dim=0)
    return torch.exp(-torch.sum(log_p_n.exp() * log_p_n))


def rank_quotas(start: int, stop: int, world_size: int) -> list[int]:
    """How many rows each rank gives when the number chosen grows from `start` to `stop`.

    Of C chosen rows, rank r holds ceil((C - r) / W): shares differ by at most one, and are equal at the end
    when W divides the sub-batch.
    """

    def held(count: int, rank: int) -> int:
        return (count - rank + world_size - 1) // world_size

    return [held(stop, rank) - held(start, rank) for rank in range(world_size)]


class CandidatePool:
    """The rows that may still be chosen.

    Args:
        key_codes_B: int64 [B], equal for rows of the same example, from 0 to `num_keys` - 1.
        num_keys: how many different examples there are.
        ranks_B: int64 [B], the rank that holds each row, from 0 to `world_size` - 1.
        world_size: W.
    """

    def __init__(self, key_codes_B: Tensor, num_keys: int, ranks_B: Tensor, world_size: int) -> None:
        self._key_codes_B = key_codes_B
        self._ranks_B = ranks_B
        self._num_keys = num_keys
        self.world_size = world_size
        self._is_open_B = torch.ones_like(key_codes_B, dtype=torch.bool)

    def rows(self) -> Tensor:
        """int64: the rows that are neither chosen nor duplicates of a chosen one, in ascending order."""
        return self._is_open_B.nonzero().squeeze(1)

    def require_enough(self, quotas: list[int]) -> None:
        """Raise a ValueError unless every rank has distinct examples enough for its whole share."""
        distinct = torch.unique(torch.stack((self._ranks_B, self._key_codes_B)), dim=1)[0]
        available = torch.bincount(distinct, minlength=self.world_size).tolist()
        for rank, (have, need) in enumerate(zip(available, quotas, strict=True)):
            if have < need:
                raise ValueError(_shortage(rank, have, need))

    def take(self, ordered_n: Tensor, quotas: list[int]) -> Tensor:
        """Walk down `ordered_n`, taking rows while their rank has quota left and their example is new.

        The walk is done for all rows at once: every rank claims its first open rows; where claims are for one
        example, the first in the order wins and later rows of that example close; repeat until no claim is lost.
        A winner is a row that the one-by-one walk takes too, unless an earlier row of its example was taken, so
        a row that closes is never one that the walk takes.

        Raises:
            ValueError: a rank has fewer distinct examples left than its quota.
        """
        keys_n, ranks_n = self._key_codes_B[ordered_n], self._ranks_B[ordered_n]
        places_n = torch.arange(len(ordered_n), device=ordered_n.device)
        is_open_n = torch.ones_like(places_n, dtype=torch.bool)
        claims = _RankClaims(ranks_n, quotas)
        while True:
            claimed_n = claims.first_open(is_open_n)
            if claimed_n is None:
                raise self._out_of_rows(keys_n[is_open_n], ranks_n[is_open_n], quotas)
            winners = places_n.new_full((self._num_keys,), len(places_n))
            winners.scatter_reduce_(0, keys_n[claimed_n], places_n[claimed_n], "amin")
            is_open_n &= places_n <= winners[keys_n]
            if bool(is_open_n[claimed_n].all()):
                break
        taken = ordered_n[claimed_n]
        self._close(taken)
        return taken

    def _close(self, taken: Tensor) -> None:
        is_taken_key = self._is_open_B.new_zeros(self._num_keys)
        is_taken_key[self._key_codes_B[taken]] = True
        self._is_open_B &= ~is_taken_key[self._key_codes_B]

    def _out_of_rows(self, keys: Tensor, ranks: Tensor, quotas: list[int]) -> ValueError:
        distinct = (len(torch.unique(keys[ranks == rank])) for rank in range(self.world_size))
        shortages = zip(range(self.world_size), distinct, quotas, strict=True)
        return ValueError(_shortage(*next(shortage for shortage in shortages if shortage[1] < shortage[2])))


class _RankClaims:
    """The first q_r open rows of every rank r, in the order of the walk."""

    def __init__(self, ranks_n: Tensor, quotas: list[int]) -> None:
        self._by_rank_n = torch.argsort(ranks_n, stable=True)
        self._ranks_n = ranks_n[self._by_rank_n]
        self._quotas_W = ranks_n.new_tensor(quotas)

    def first_open(self, is_open_n: Tensor) -> Tensor | None:
        """Which of the n rows these are (bool), or None when a rank has fewer open rows than its quota."""
        is_open_by_rank_n = is_open_n[self._by_rank_n]
        open_W = torch.bincount(self._ranks_n[is_open_by_rank_n], minlength=len(self._quotas_W))
        if bool((open_W < self._quotas_W).any()):
            return None
        before_W = open_W.cumsum(0) - open_W
        ordinal_n = is_open_by_rank_n.cumsum(0) - before_W[self._ranks_n]
        claimed_n = torch.empty_like(is_open_n)
        claimed_n[self._by_rank_n] = is_open_by_rank_n & (ordinal_n <= self._quotas_W[self._ranks_n])
        return claimed_n


def _shortage(rank: int, have: int, need: int) -> str:
    return (
        f"rank {rank} has {have} distinct example keys to choose from, but needs {need}: use a larger super-batch, "
        "a smaller sub-batch, or fewer duplicates"
    )
