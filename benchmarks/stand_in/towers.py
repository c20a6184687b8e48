"""Two small transformers, alike in kind and cost to what a reference model is made of; Triton loads this file."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class ImageTower(nn.Module):
    """uint8 ``[n, 3, side, side]`` to unit rows ``[n, out]``."""

    def __init__(self, *, side: int, patch: int, width: int, depth: int, out: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.places = nn.Parameter(torch.zeros((side // patch) ** 2, width))
        self.blocks = _blocks(width, depth)
        self.project = nn.Linear(width, out)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(image.float() / 255).flatten(2).mT + self.places
        return functional.normalize(self.project(self.blocks(tokens).mean(1)), dim=1)


class TextTower(nn.Module):
    """int32 ``[n, T]`` to unit rows ``[n, out]``."""

    def __init__(self, *, vocabulary: int, width: int, depth: int, out: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.blocks = _blocks(width, depth)
        self.project = nn.Linear(width, out)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.project(self.blocks(self.words(tokens)).mean(1)), dim=1)


def _blocks(width: int, depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
