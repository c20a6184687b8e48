"""Scores under a loss that is a sum over pairs: S_ii + sum over chosen k of (S_ik + S_ki).

The pairwise sigmoid loss is one (SigLIP, arXiv 2303.15343), and so is any matrix of pair losses.

Shapes: B = super-batch, R = rows of one tile, c = newly chosen rows.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from jest_core.pair_losses import matching_loss, mismatched_loss_
from jest_core.policy import Precision
from jest_core.tiles import PairLogits, RowTile, add_at, chosen_tiles, row_tiles
from jest_core.types import Embeddings, ExampleLosses, ModelOutputs, PairLosses
from jest_core.workers import Scratch, Workers


class AdditiveScores:
    """The scores of a super-batch under losses that add up over pairs, as rows are chosen.

    S is the sum of the models' losses, each times its sign: learner minus reference, or one of them alone.
    Losses are float32 whatever the models' outputs are; their sums over chosen rows are kept in float64, because
    differences between rows decide and the sums grow to thousands of times their terms.

    Args:
        models: outputs and sign of each model that counts, all of the same super-batch and device.
        precision: of the products of embeddings.
        workers: who compute the tiles.
    """

    def __init__(self, models: Sequence[tuple[ModelOutputs, int]], precision: Precision, workers: Workers) -> None:
        first, _ = models[0]
        self._size = len(first)
        self._workers = workers
        self._terms = [(_terms(outputs, precision), sign) for outputs, sign in models]
        self._matching_B = torch.zeros(self._size, dtype=torch.float64, device=first.device)
        for terms, sign in self._terms:
            self._matching_B.add_(terms.matching_B, alpha=sign)
        self._sums_B = self._matching_B.clone()

    def sums(self, rows: Tensor) -> Tensor:
        """The scores of `rows`, given all rows chosen so far. For a chosen row its own term counts thrice."""
        return self._sums_B[rows]

    def add_chosen(self, chosen: Tensor, rows: Tensor) -> None:
        """Count the newly chosen rows in the scores of `rows`."""
        for chosen_c in chosen_tiles(chosen):
            for terms, _ in self._terms:
                terms.choose(chosen_c)
            self._workers.for_each(row_tiles(rows, self._size), self._add_tile)
            for terms, sign in self._terms:
                self._sums_B.index_add_(0, chosen_c, terms.corrections(chosen_c), alpha=sign)

    def _add_tile(self, tile: RowTile, scratch: Scratch) -> None:
        for terms, sign in self._terms:
            for sums_R in terms.sums_with_chosen(tile, scratch):
                add_at(self._sums_B, tile, sums_R, sign)

    def among(self, chosen: Tensor) -> Tensor:
        """The scores of all chosen rows from the pairs between them alone."""
        self._sums_B.copy_(self._matching_B)
        self.add_chosen(chosen, chosen)
        return self._sums_B[chosen] - 2 * self._matching_B[chosen]

    def num_terms(self, num_chosen: int) -> int:
        """The row's own pair, and two with each chosen one."""
        return 1 + 2 * num_chosen


class _SigmoidTerms:
    """One model's sigmoid losses between tiles of rows and the newly chosen rows, computed from embeddings."""

    def __init__(self, embeddings: Embeddings, precision: Precision) -> None:
        self._logits = PairLogits(embeddings, precision)
        self._zero = torch.zeros((), dtype=torch.float32, device=embeddings.device)
        self.matching_B = matching_loss(self._logits.matching_B)
        self.choose = self._logits.choose

    def sums_with_chosen(self, tile: RowTile, scratch: Scratch) -> Iterator[Tensor]:
        for logits_cR in self._logits.tiles(tile, scratch):
            losses_cR = mismatched_loss_(logits_cR, self._zero)
            yield torch.sum(losses_cR, dim=0, out=scratch.empty("sums", losses_cR.shape[1]))

    def corrections(self, chosen_c: Tensor) -> Tensor:
        """What the chosen rows' sums lack: their own pair was counted, twice, as mismatched.

        softplus(-x) - softplus(x) = -x.
        """
        return -2 * self._logits.matching_B[chosen_c].double()


class _MatrixTerms:
    """One model's pair losses between tiles of rows and the newly chosen rows, read from its matrix."""

    def __init__(self, losses: PairLosses) -> None:
        self._losses_BB = losses.values.detach()
        self._chosen_c = torch.empty(0, dtype=torch.int64)
        self.matching_B = self._losses_BB.diagonal().float()
        _require_finite(self.matching_B)

    def choose(self, chosen_c: Tensor) -> None:
        self._chosen_c = chosen_c

    def sums_with_chosen(self, tile: RowTile, scratch: Scratch) -> Iterator[Tensor]:
        del scratch  # the kernels that read scattered rows and columns allocate what they return
        chosen_c = self._chosen_c
        if isinstance(tile, slice):
            with_texts_Rc = self._losses_BB[tile].index_select(1, chosen_c)
            with_images_cR = self._losses_BB[:, tile].index_select(0, chosen_c)
        else:
            with_texts_Rc = self._losses_BB[tile[:, None], chosen_c]
            with_images_cR = self._losses_BB[chosen_c[:, None], tile]
        for losses, over in ((with_texts_Rc, 1), (with_images_cR, 0)):
            sums_R = losses.sum(dim=over, dtype=torch.float32)
            _require_finite(sums_R)
            yield sums_R

    def corrections(self, chosen_c: Tensor) -> Tensor:
        """Nothing: the matrix has the right loss for a row's own pair."""
        return torch.zeros(len(chosen_c), dtype=torch.float64, device=chosen_c.device)


def _terms(outputs: ModelOutputs, precision: Precision) -> _SigmoidTerms | _MatrixTerms:
    assert not isinstance(outputs, ExampleLosses)
    if isinstance(outputs, PairLosses):
        return _MatrixTerms(outputs)
    return _SigmoidTerms(outputs, precision)


def _require_finite(sums: Tensor) -> None:
    if not bool(sums.isfinite().all()):
        raise ValueError("pair losses must be finite: the matrix holds NaN, Inf or values whose sum overflows float32")
