"""Scores under the softmax loss (CLIP): -x_ii + 1/2 (LSE over chosen j of x_ij + LSE over chosen j of x_ji).

The loss of a batch is not a sum over pairs, but a row's log-sum-exp over the chosen ones can grow with them: it is kept
as a running maximum and a sum of exponentials relative to it (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3).

Shapes: B = super-batch, R = rows of one tile, c = newly chosen rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jest_core.policy import Precision
from jest_core.tiles import PairLogits, RowTile, chosen_tiles, row_tiles
from jest_core.types import Embeddings
from jest_core.workers import Scratch, Workers


class SoftmaxScores:
    """The scores of a super-batch under the softmax loss, as rows are chosen.

    With nothing chosen there is no denominator, and a score is -x_ii alone. A bias moves all logits of a model alike
    and cancels, so it is left out.

    Args:
        models: embeddings and sign of each model that counts, all of the same super-batch and device.
        precision: of the products.
        workers: who compute the tiles.
    """

    def __init__(self, models: Sequence[tuple[Embeddings, int]], precision: Precision, workers: Workers) -> None:
        first, _ = models[0]
        self._size = len(first)
        self._num_chosen = 0
        self._workers = workers
        self._models = [(_SoftmaxTerms(embeddings, precision), sign) for embeddings, sign in models]

    def sums(self, rows: Tensor) -> Tensor:
        """The scores of `rows`, given all rows chosen so far. A chosen row's own logit is in its denominators."""
        scores = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for terms, sign in self._models:
            scores.add_(terms.scores(rows, with_denominators=self._num_chosen > 0), alpha=sign)
        return scores

    def add_chosen(self, chosen: Tensor, rows: Tensor) -> None:
        """Count the newly chosen rows in the scores of `rows`."""
        for chosen_c in chosen_tiles(chosen):
            for terms, _ in self._models:
                terms.logits.choose(chosen_c)
            self._workers.for_each(row_tiles(rows, self._size), self._add_tile)
        self._num_chosen += len(chosen)

    def _add_tile(self, tile: RowTile, scratch: Scratch) -> None:
        for terms, _ in self._models:
            terms.add(tile, scratch)

    def among(self, chosen: Tensor) -> Tensor:
        """The scores of all chosen rows from the pairs between them alone."""
        for terms, _ in self._models:
            terms.forget()
        self.add_chosen(chosen, chosen)
        return self.sums(chosen)

    def num_terms(self, num_chosen: int) -> int:
        """One: the loss is no sum over pairs."""
        del num_chosen
        return 1


class _SoftmaxTerms:
    """One model's matching logits and the log-sum-exps of every row over the chosen ones, for both directions."""

    def __init__(self, embeddings: Embeddings, precision: Precision) -> None:
        self.logits = PairLogits(embeddings, precision, with_bias=False)
        size, device = len(embeddings), embeddings.device
        self._denominators = tuple(_RunningLogSumExp(size, device) for _ in range(2))

    def add(self, tile: RowTile, scratch: Scratch) -> None:
        for denominator, logits_cR in zip(self._denominators, self.logits.tiles(tile, scratch), strict=True):
            denominator.add_(tile, logits_cR, scratch)

    def scores(self, rows: Tensor, *, with_denominators: bool) -> Tensor:
        scores = -self.logits.matching_B[rows].double()
        if with_denominators:
            for denominator in self._denominators:
                scores.add_(denominator.of(rows), alpha=0.5)
        return scores

    def forget(self) -> None:
        for denominator in self._denominators:
            denominator.forget()


class _RunningLogSumExp:
    """log(sum of exp(x)) for every row, over values that come in tiles."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._max_B = torch.empty(size, dtype=torch.float32, device=device)
        self._sum_B = torch.empty(size, dtype=torch.float64, device=device)
        self.forget()

    def forget(self) -> None:
        self._max_B.fill_(-torch.inf)
        self._sum_B.zero_()

    def add_(self, tile: RowTile, values_cR: Tensor, scratch: Scratch) -> None:
        """Take in a tile, which is overwritten."""
        rows = values_cR.shape[1]
        old_max_R = self._max_B[tile]
        new_max_R = torch.amax(values_cR, dim=0, out=scratch.empty("max", rows))
        torch.maximum(new_max_R, old_max_R, out=new_max_R)
        torch.sub(values_cR, new_max_R, out=values_cR).exp_()
        tile_sum_R = torch.sum(values_cR, dim=0, out=scratch.empty("sums", rows))
        rescaled_R = (old_max_R - new_max_R).exp_()
        self._sum_B[tile] = self._sum_B[tile] * rescaled_R + tile_sum_R
        self._max_B[tile] = new_max_R

    def of(self, rows: Tensor) -> Tensor:
        return self._max_B[rows] + self._sum_B[rows].log()
