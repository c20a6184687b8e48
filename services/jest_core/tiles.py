"""Pair logits a tile at a time: what keeps a selection at the speed of its matrix products.

A tile is c chosen rows by R rows of the super-batch. Tiles stay in cache and are written into one buffer again and
again, so that beside the products there is hardly any memory traffic. The rows of a tile are views of the embeddings
wherever most of them count: computing a few products too many is cheaper than copying rows together.

Shapes: B = super-batch, R = rows of one tile, c = newly chosen rows, D = embedding width (each model its own).
"""

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from jest_core.policy import Precision
from jest_core.types import Embeddings
from jest_core.workers import Scratch

# 256 rows by the hundred rows of a usual chunk stay in a core's second-level cache.
TILE_ROWS = 256
TILE_COLUMNS = 2048
# A GPU wants fewer, larger products; its tile may be as large as its second-level cache.
GPU_TILE_ROWS = 8192

_VIEWS_PAY_FROM = 0.8
"""The share of rows that must count for their tiles to be views."""

RowTile: TypeAlias = slice | Tensor


def row_tiles(rows: Tensor, size: int) -> Iterator[RowTile]:
    """Tiles that cover `rows` of `size` rows: slices of all rows if most of them are wanted, else int64 indices."""
    tile_rows = TILE_ROWS if rows.device.type == "cpu" else GPU_TILE_ROWS
    if len(rows) >= _VIEWS_PAY_FROM * size:
        return (slice(start, min(start + tile_rows, size)) for start in range(0, size, tile_rows))
    return (rows[start : start + tile_rows] for start in range(0, len(rows), tile_rows))


def chosen_tiles(chosen: Tensor) -> Iterator[Tensor]:
    """`chosen` in pieces that fit a tile."""
    return (chosen[start : start + TILE_COLUMNS] for start in range(0, len(chosen), TILE_COLUMNS))


def add_at(sums_B: Tensor, tile: RowTile, values_R: Tensor, alpha: int) -> None:
    """Add alpha * values to a tile's rows of float64 sums."""
    if isinstance(tile, slice):
        sums_B[tile].add_(values_R, alpha=alpha)
    else:
        sums_B.index_add_(0, tile, values_R.double(), alpha=alpha)


class PairLogits:
    """One model's pair logits, scale * <image, text> + bias, between tiles of rows and the newly chosen rows.

    float32 whatever the embeddings are: 16-bit embeddings are widened once, which costs 8 * B * D bytes. Under
    precision `bfloat16` they are rounded instead, and so are the products, but nothing after them.
    """

    def __init__(self, embeddings: Embeddings, precision: Precision, *, with_bias: bool = True) -> None:
        bias = embeddings.bias if with_bias else 0.0
        self._scale = embeddings.scale
        self._rounds = precision == "bfloat16"
        self.matching_B = _matching_logits(embeddings, bias)
        dtype = torch.bfloat16 if self._rounds else torch.float32
        self._image_BD = embeddings.image.detach().to(dtype)
        self._text_BD = embeddings.text.detach().to(dtype)
        self._bias = self.matching_B.new_full((1,), bias)
        self._chosen_images_cD = self._image_BD[:0]
        self._chosen_texts_cD = self._text_BD[:0]

    def choose(self, chosen_c: Tensor) -> None:
        """Make these the chosen rows that the next tiles are between."""
        self._chosen_images_cD = self._image_BD.index_select(0, chosen_c)
        self._chosen_texts_cD = self._text_BD.index_select(0, chosen_c)

    def tiles(self, tile: RowTile, scratch: Scratch) -> Iterator[Tensor]:
        """float32 [c, R], twice: the rows' images with the chosen texts, and their texts with the chosen images.

        Both are written to the same place: use one before you take the next.
        """
        yield self._products(self._chosen_texts_cD, _rows_of(self._image_BD, tile, scratch), scratch)
        yield self._products(self._chosen_images_cD, _rows_of(self._text_BD, tile, scratch), scratch)

    def _products(self, chosen_cD: Tensor, rows_RD: Tensor, scratch: Scratch) -> Tensor:
        shape = (len(chosen_cD), len(rows_RD))
        logits_cR = scratch.empty("logits", *shape)
        # With `out`, the product has the type of `out` inside a trainer's autocast as well.
        if self._rounds:
            rounded_cR = scratch.empty("logits", *shape, dtype=torch.bfloat16)
            torch.mm(chosen_cD, rows_RD.T, out=rounded_cR)
            return torch.add(self._bias, rounded_cR, alpha=self._scale, out=logits_cR)
        return torch.addmm(self._bias, chosen_cD, rows_RD.T, alpha=self._scale, out=logits_cR)


def _rows_of(matrix_BD: Tensor, tile: RowTile, scratch: Scratch) -> Tensor:
    if isinstance(tile, slice):
        return matrix_BD[tile]
    rows_RD = scratch.empty("rows", len(tile), matrix_BD.shape[1], dtype=matrix_BD.dtype)
    return torch.index_select(matrix_BD, 0, tile, out=rows_RD)


def _matching_logits(embeddings: Embeddings, bias: float) -> Tensor:
    """The logits of the pairs (i, i), float32 [B]."""
    image_BD, text_BD = embeddings.image.detach(), embeddings.text.detach()
    logits_B = torch.empty(len(embeddings), dtype=torch.float32, device=embeddings.device)
    for start in range(0, len(embeddings), TILE_ROWS):
        tile = slice(start, start + TILE_ROWS)
        torch.sum(image_BD[tile].float() * text_BD[tile].float(), dim=1, out=logits_B[tile])
    return logits_B.mul_(embeddings.scale).add_(bias)
