"""The demo's model: a small convolutional image tower and a small text tower, trained with the SigLIP loss.

Depends on torch alone: this file is also what Triton loads as the reference model's architecture.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class ImageTower(nn.Module):
    """Pictures to unit vectors: uint8 ``[n, 3, 32, 32]`` to float32 ``[n, width]``."""

    def __init__(self, *, width: int = 96, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, kernel_size=4, stride=2, padding=1)
        self.down1 = _down(channels, 2 * channels)
        self.mix = nn.Conv2d(2 * channels, 2 * channels, kernel_size=3, padding=1)
        self.down2 = _down(2 * channels, 4 * channels)
        self.project = nn.Linear(4 * channels * 4 * 4, width)

    def forward(self, image: Tensor) -> Tensor:
        """Embed pictures; every row depends on its own picture alone."""
        # Channels last is the faster layout for these convolutions on a CPU, by a third on two cores.
        pixels = image.to(torch.float32, memory_format=torch.channels_last).mul(2 / 255).sub(1)
        maps = functional.relu(self.stem(pixels))
        maps = self.down1(maps)
        maps = maps + functional.relu(self.mix(maps))
        maps = self.down2(maps)
        return functional.normalize(self.project(maps.flatten(1)), dim=1)


class TextTower(nn.Module):
    """Captions to unit vectors: int32 ``[n, T]``, 0 = padding, to float32 ``[n, width]``.

    A bag of words, each seen together with its two neighbours, so that the order of "dark skin tone, light skin
    tone" is not lost.
    """

    def __init__(self, *, vocabulary: int, width: int = 96, hidden: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden, padding_idx=0)
        nn.init.normal_(self.embed.weight, std=hidden**-0.5)
        self.neighbours = nn.Conv1d(hidden, hidden, kernel_size=3, padding=1)
        self.project = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed captions; every row depends on its own caption alone."""
        present = (tokens != 0).unsqueeze(-1)
        words = self.embed(tokens) * present
        phrases = functional.relu(self.neighbours(words.transpose(1, 2)).transpose(1, 2))
        bag = ((words + phrases) * present).sum(1) / present.sum(1).clamp(min=1).sqrt()
        return functional.normalize(self.project(bag), dim=1)


class TwoTowers(nn.Module):
    """Both towers with SigLIP's learnable scale (kept as its logarithm) and bias."""

    def __init__(self, *, vocabulary: int, width: int = 96, scale: float = 10.0, bias: float = -10.0) -> None:
        super().__init__()
        self.image = ImageTower(width=width)
        self.text = TextTower(vocabulary=vocabulary, width=width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embed pictures and captions: two matrices ``[n, width]`` of unit rows."""
        return self.image(image), self.text(tokens)


def _down(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inside, outside, kernel_size=3, stride=2, padding=1), nn.GroupNorm(8, outside), nn.ReLU()
    )
