"""Which rows a chunk takes: the best-ranked ones that quotas, example keys and groups still allow.

Adding Gumbel noise to logits and taking the top c is exactly sampling c times from their softmax without
replacement (Kool et al., arXiv 1903.06059, section 2). Duplicates of one example are false negatives
of each other, so at most one of them is ever taken.

Shapes: B = super-batch, n = rows in order of preference, W = ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

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


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Rows that share a limit: a code for each, int64 [B], -1 for a row of no group; and the most to take of one."""

    codes: Tensor
    limit: int


class CandidatePool:
    """The rows that may still be chosen.

    Args:
        key_codes_B: int64 [B], equal for rows of the same example, from 0 to `num_keys` - 1.
        num_keys: how many different examples there are.
        ranks_B: int64 [B], the rank that holds each row, from 0 to `world_size` - 1.
        world_size: W.
        groups: of which no more than so many rows may be chosen; None for no such limit.
        device: where `rows` and `take` deal in rows.
    """

    def __init__(
        self,
        key_codes_B: Tensor,
        num_keys: int,
        ranks_B: Tensor,
        world_size: int,
        groups: Groups | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._key_codes_B = key_codes_B
        self._ranks_B = ranks_B
        self._num_keys = num_keys
        self._device = device
        self.world_size = world_size
        self._is_open_B = torch.ones_like(key_codes_B, dtype=torch.bool)
        self._groups = groups
        num_groups = int(groups.codes.max()) + 1 if groups else 0
        # The last entry is for rows of no group, whose code is -1.
        self._room = [groups.limit] * num_groups + [len(key_codes_B)] if groups else [len(key_codes_B)]

    def rows(self) -> Tensor:
        """int64: the rows that may still be chosen, in ascending order."""
        return self._is_open_B.nonzero().squeeze(1).to(self._device)

    def require_enough(self, quotas: list[int]) -> None:
        """Raise a ValueError unless every rank by itself has examples enough for its whole share.

        What ranks take from each other, by duplicates and groups that lie on several of them, shows only in the walk.
        """
        distinct = torch.unique(self._ranks_B * self._num_keys + self._key_codes_B)
        available = torch.bincount(distinct // self._num_keys, minlength=self.world_size).tolist()
        for rank, (have, need) in enumerate(zip(available, quotas, strict=True)):
            if have < need:
                raise ValueError(_shortage(rank, have, need, "distinct example keys"))
        if self._groups is not None:
            self._require_groups(quotas, self._groups)

    def take(self, ordered_n: Tensor, quotas: list[int]) -> Tensor:
        """Walk down `ordered_n`, taking rows whose rank has quota left, whose example is new, whose group is not full.

        The walk ends when the quotas are filled: usually after little more than as many rows.

        Raises:
            ValueError: the rows ran out before the quotas were filled.
        """
        left, wanted = list(quotas), sum(quotas)
        taken: list[int] = []
        keys: set[int] = set()
        for block in torch.split(ordered_n, max(2 * wanted, 1)):
            if len(taken) == wanted:
                break
            for row, key, rank, group in self._described(block):
                if left[rank] and key not in keys and self._room[group]:
                    taken.append(row)
                    keys.add(key)
                    left[rank] -= 1
                    self._room[group] -= 1
        if len(taken) < wanted:
            rank = next(rank for rank, count in enumerate(left) if count)
            what = "distinct example keys" if self._groups is None else "rows that keys and max_per_group allow"
            raise ValueError(_shortage(rank, quotas[rank] - left[rank], quotas[rank], what))
        rows = torch.tensor(taken, dtype=torch.int64)
        self._close(rows)
        return rows.to(self._device)

    def _described(self, rows: Tensor) -> Iterator[tuple[int, int, int, int]]:
        rows = rows.cpu()
        groups = self._groups.codes[rows].tolist() if self._groups else repeat(-1)
        return zip(rows.tolist(), self._key_codes_B[rows].tolist(), self._ranks_B[rows].tolist(), groups, strict=False)

    def _close(self, taken: Tensor) -> None:
        is_taken_key = self._is_open_B.new_zeros(self._num_keys)
        is_taken_key[self._key_codes_B[taken]] = True
        self._is_open_B &= ~is_taken_key[self._key_codes_B]
        if self._groups is not None:
            has_room = torch.tensor([room > 0 for room in self._room])
            self._is_open_B &= has_room[self._groups.codes]

    def _require_groups(self, quotas: list[int], groups: Groups) -> None:
        # Rows of one rank and one group beyond the limit can never be chosen, nor a second row of an example.
        for rank, need in enumerate(quotas):
            is_here = self._ranks_B == rank
            codes = groups.codes[is_here]
            _, per_group = torch.unique(codes[codes >= 0], return_counts=True)
            have = int((codes < 0).sum()) + int(per_group.clamp(max=groups.limit).sum())
            if have < need:
                raise ValueError(_shortage(rank, have, need, f"rows within max_per_group ({groups.limit})"))


def _shortage(rank: int, have: int, need: int, what: str) -> str:
    return (
        f"rank {rank} has {have} {what} to choose from, but needs {need}: use a larger super-batch, "
        "a smaller sub-batch, fewer duplicates or a higher max_per_group"
    )
