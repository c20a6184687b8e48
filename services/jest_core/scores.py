"""Running joint scores: for every row i, S_ii + sum over chosen k of (S_ik + S_ki), without a B x B matrix.

Choosing c more rows adds their 2 * c columns of pair losses to every row's sum. They are computed in tiles that
stay in cache, in buffers that are allocated once. A whole selection costs O(B * b * D) operations, whatever the
number of chunks, and O(R * c) memory beside the embeddings.

Shapes: B = super-batch, R = rows of one tile, c = newly chosen rows, D = embedding width (each model its own).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from jest_core.pair_losses import matching_loss, mismatched_loss_
from jest_core.types import Embeddings

# 1024 x 2048 float32 products are 8 MiB: within a CPU's last-level cache and a GPU's L2.
TILE_ROWS = 1024
TILE_COLUMNS = 2048


class SigmoidScores:
    """The scores of a super-batch under the sigmoid loss, as rows are chosen.

    S is the sum of the models' losses, each times its sign: learner minus reference, or one of them alone.
    Losses are float32 whatever the embeddings are; their sums over chosen rows are kept in float64, because
    differences between rows decide and the sums grow to thousands of times their terms.

    Args:
        models: embeddings and sign of each model that counts, all of the same super-batch and device.
        max_chosen: the most rows that one call of `add_chosen` will bring.
    """

    def __init__(self, models: Sequence[tuple[Embeddings, int]], max_chosen: int) -> None:
        first, _ = models[0]
        columns = max(1, min(max_chosen, TILE_COLUMNS))
        rows = min(len(first), TILE_ROWS)
        tile = first.image.new_empty(rows * columns, dtype=torch.float32)
        self._terms = [_ModelTerms(embeddings, sign, tile, columns) for embeddings, sign in models]
        self._columns = columns
        self._tile_sums_R = first.image.new_empty(rows, dtype=torch.float64)
        self._sums_B = first.image.new_zeros(len(first), dtype=torch.float64)
        for terms in self._terms:
            self._sums_B += terms.matching_scores()

    def sums(self, rows: Tensor) -> Tensor:
        """The float64 scores of `rows` (int64), given all rows chosen so far."""
        return self._sums_B[rows]

    def add_chosen(self, chosen: Tensor, rows: Tensor) -> None:
        """Count the newly chosen rows in the scores of `rows`; the scores of other rows become meaningless.

        Rows that can no longer be chosen need no scores, and leaving them out saves their products.
        """
        for chosen_c in _slices(chosen, self._columns):
            partners = [terms.gather_partners(chosen_c) for terms in self._terms]
            for rows_R in _slices(rows, TILE_ROWS):
                sums_R = self._tile_sums_R[: len(rows_R)].zero_()
                for terms, (texts_cD, images_cD) in zip(self._terms, partners, strict=True):
                    terms.add_to(sums_R, rows_R, texts_cD, images_cD)
                self._sums_B.index_add_(0, rows_R, sums_R)
            for terms in self._terms:
                self._sums_B.index_add_(0, chosen_c, terms.matching_corrections(chosen_c))


class _ModelTerms:
    """One model's signed pair losses between a tile of rows and the newly chosen rows."""

    def __init__(self, embeddings: Embeddings, sign: int, tile: Tensor, columns: int) -> None:
        image_BD, text_BD = embeddings.image.detach(), embeddings.text.detach()
        rows = tile.numel() // columns
        self._image_BD, self._text_BD = image_BD, text_BD
        self._scale, self._sign = embeddings.scale, sign
        self._tile = tile
        self._zero = tile.new_zeros(())
        self._bias_c = tile.new_full((columns,), embeddings.bias)
        self._row_sums_R = tile.new_empty(rows)
        self._rows = _RowBuffer(image_BD, rows)
        self._chosen_images, self._chosen_texts = _RowBuffer(image_BD, columns), _RowBuffer(text_BD, columns)
        self._matching_logits_B = _matching_logits(embeddings)

    def matching_scores(self) -> Tensor:
        """The signed losses of the pairs (i, i), float32 [B]."""
        return self._sign * matching_loss(self._matching_logits_B)

    def matching_corrections(self, chosen_c: Tensor) -> Tensor:
        """What the sums of the chosen rows themselves lack: their own pair was counted, twice, as mismatched.

        softplus(-x) - softplus(x) = -x.
        """
        return (-2 * self._sign) * self._matching_logits_B[chosen_c].double()

    def gather_partners(self, chosen_c: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen rows' texts, for all images to meet, and images, for all texts; valid until the next call."""
        texts_cD = self._chosen_texts.gather(self._text_BD, chosen_c)
        return texts_cD, self._chosen_images.gather(self._image_BD, chosen_c)

    def add_to(self, sums_R: Tensor, rows_R: Tensor, texts_cD: Tensor, images_cD: Tensor) -> None:
        """Add to each row's sum its losses with the chosen rows, S_ik through its image and S_ki through its text."""
        self._add_direction(sums_R, self._rows.gather(self._image_BD, rows_R), texts_cD)
        self._add_direction(sums_R, self._rows.gather(self._text_BD, rows_R), images_cD)

    def _add_direction(self, sums_R: Tensor, rows_RD: Tensor, chosen_cD: Tensor) -> None:
        rows, columns = len(rows_RD), len(chosen_cD)
        losses_Rc = self._tile[: rows * columns].view(rows, columns)
        # With `out`, the product is float32 inside a trainer's autocast as well.
        torch.addmm(self._bias_c[:columns], rows_RD, chosen_cD.T, alpha=self._scale, out=losses_Rc)
        mismatched_loss_(losses_Rc, self._zero)
        row_sums_R = torch.sum(losses_Rc, dim=1, out=self._row_sums_R[:rows])
        sums_R.add_(row_sums_R, alpha=self._sign)


class _RowBuffer:
    """Space for some rows of a matrix as float32, used again and again."""

    def __init__(self, like_BD: Tensor, rows: int) -> None:
        self._rows_RD = like_BD.new_empty(rows, like_BD.shape[1])
        self._is_float32 = like_BD.dtype == torch.float32
        self._float32_RD = self._rows_RD if self._is_float32 else torch.empty_like(self._rows_RD, dtype=torch.float32)

    def gather(self, matrix_BD: Tensor, rows_R: Tensor) -> Tensor:
        rows_RD = self._rows_RD[: len(rows_R)]
        torch.index_select(matrix_BD, 0, rows_R, out=rows_RD)
        return rows_RD if self._is_float32 else self._float32_RD[: len(rows_R)].copy_(rows_RD)


def _matching_logits(embeddings: Embeddings) -> Tensor:
    """The logits of the pairs (i, i), float32 [B]."""
    image_BD, text_BD = embeddings.image, embeddings.text
    logits_B = image_BD.new_empty(len(embeddings), dtype=torch.float32)
    for start in range(0, len(embeddings), TILE_ROWS):
        tile = slice(start, start + TILE_ROWS)
        torch.sum(image_BD[tile].float() * text_BD[tile].float(), dim=1, out=logits_B[tile])
    return logits_B.mul_(embeddings.scale).add_(embeddings.bias)


def _slices(rows: Tensor, size: int) -> Iterator[Tensor]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
