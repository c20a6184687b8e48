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

# 1024 x 2048 float32 products are 8 MiB, within a CPU's last-level cache; a chunk of 100 rows fits the second level.
TILE_ROWS = 1024
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


class Workspace:
    """The buffers that every tile is written into, shared by the models of a selection.

    Args:
        size: B.
        max_chosen: the most rows that are chosen between two looks at the scores.
        device: where the embeddings are.
    """

    def __init__(self, size: int, max_chosen: int, device: torch.device) -> None:
        self.rows = min(size, TILE_ROWS if device.type == "cpu" else GPU_TILE_ROWS)
        self.columns = max(1, min(max_chosen, TILE_COLUMNS))
        self._tile = torch.empty(self.rows * self.columns, dtype=torch.float32, device=device)
        self._rounded_tile: Tensor | None = None

    def tile(self, columns: int, rows: int) -> Tensor:
        """float32 [c, R], with whatever was written there last."""
        return self._tile[: columns * rows].view(columns, rows)

    def rounded_tile(self, columns: int, rows: int) -> Tensor:
        """bfloat16 [c, R], likewise."""
        if self._rounded_tile is None:
            self._rounded_tile = torch.empty_like(self._tile, dtype=torch.bfloat16)
        return self._rounded_tile[: columns * rows].view(columns, rows)


class PairLogits:
    """One model's pair logits, scale * <image, text> + bias, between tiles of rows and the newly chosen rows.

    float32 whatever the embeddings are: 16-bit embeddings are widened once, which costs 8 * B * D bytes. Under
    precision `bfloat16` they are rounded instead, and so are the products, but nothing after them.
    """

    def __init__(self, embeddings: Embeddings, precision: Precision, workspace: Workspace) -> None:
        self._scale, self._bias = embeddings.scale, embeddings.bias
        self._workspace = workspace
        self._rounds = precision == "bfloat16"
        self.matching_B = _matching_logits(embeddings)
        dtype = torch.bfloat16 if self._rounds else torch.float32
        self._images = _Rows(embeddings.image.detach().to(dtype), workspace)
        self._texts = _Rows(embeddings.text.detach().to(dtype), workspace)
        self._bias_R = self.matching_B.new_full((workspace.rows,), embeddings.bias)

    def choose(self, chosen_c: Tensor) -> None:
        """Make these the chosen rows that the next tiles are between."""
        self._images.choose(chosen_c)
        self._texts.choose(chosen_c)

    def tiles(self, tile: RowTile) -> Iterator[Tensor]:
        """float32 [c, R], twice: the rows' images with the chosen texts, and their texts with the chosen images.

        Both are written to the same place: use one before you take the next.
        """
        yield self._products(self._texts.chosen_cD, self._images.of(tile))
        yield self._products(self._images.chosen_cD, self._texts.of(tile))

    def _products(self, chosen_cD: Tensor, rows_RD: Tensor) -> Tensor:
        logits_cR = self._workspace.tile(len(chosen_cD), len(rows_RD))
        # With `out`, the product has the type of `out` inside a trainer's autocast as well.
        if self._rounds:
            rounded_cR = self._workspace.rounded_tile(len(chosen_cD), len(rows_RD))
            torch.mm(chosen_cD, rows_RD.T, out=rounded_cR)
            return logits_cR.copy_(rounded_cR).mul_(self._scale).add_(self._bias)
        return torch.addmm(self._bias_R[: len(rows_RD)], chosen_cD, rows_RD.T, alpha=self._scale, out=logits_cR)


class _Rows:
    """The rows of one embedding matrix: those of a tile, and the chosen ones, gathered into buffers if need be."""

    def __init__(self, matrix_BD: Tensor, workspace: Workspace) -> None:
        width = matrix_BD.shape[1]
        self._matrix_BD = matrix_BD
        self._workspace = workspace
        self._chosen_cD = matrix_BD.new_empty(workspace.columns, width)
        self._gathered_RD: Tensor | None = None
        self.chosen_cD = self._chosen_cD[:0]

    def choose(self, chosen_c: Tensor) -> None:
        self.chosen_cD = self._chosen_cD[: len(chosen_c)]
        torch.index_select(self._matrix_BD, 0, chosen_c, out=self.chosen_cD)

    def of(self, tile: RowTile) -> Tensor:
        if isinstance(tile, slice):
            return self._matrix_BD[tile]
        if self._gathered_RD is None:
            self._gathered_RD = self._matrix_BD.new_empty(self._workspace.rows, self._matrix_BD.shape[1])
        rows_RD = self._gathered_RD[: len(tile)]
        return torch.index_select(self._matrix_BD, 0, tile, out=rows_RD)


def _matching_logits(embeddings: Embeddings) -> Tensor:
    """The logits of the pairs (i, i), float32 [B]."""
    image_BD, text_BD = embeddings.image.detach(), embeddings.text.detach()
    logits_B = torch.empty(len(embeddings), dtype=torch.float32, device=embeddings.device)
    for start in range(0, len(embeddings), TILE_ROWS):
        tile = slice(start, start + TILE_ROWS)
        torch.sum(image_BD[tile].float() * text_BD[tile].float(), dim=1, out=logits_B[tile])
    return logits_B.mul_(embeddings.scale).add_(embeddings.bias)
