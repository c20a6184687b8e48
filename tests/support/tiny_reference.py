"""A reference model of two linear towers, as an architecture file that Triton can load."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class ImageTower(nn.Module):
    """uint8 [n, 3, 32, 32] to unit vectors [n, width]."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(3 * 32 * 32, width)

    def forward(self, image: Tensor) -> Tensor:
        return functional.normalize(self.project(image.flatten(1).float() / 255 - 0.5), dim=1)


class TextTower(nn.Module):
    """int32 [n, T] to unit vectors [n, width]."""

    def __init__(self, *, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.normalize(self.embed(tokens).mean(1), dim=1)
