"""Two towers that are small, depend on every input, and misbehave when a picture asks for it (see ``Mood``).

Triton loads this file as the reference model's architecture, so it depends on torch alone.
"""

from __future__ import annotations

import enum
import os
import time

import torch
from torch import nn
from torch.nn import functional

SIDE = 8
WIDTH = 12
VOCABULARY = 50
MAGIC = (11, 222, 33)
"""A picture whose first pixels are these has the mood that the next pixel tells."""
NAP_S = 0.5
SECRET = "/secret/place"


class Mood(enum.IntEnum):
    """What the image tower does to a whole batch when one picture of it has the mood."""

    NAN = 1
    WRONG_WIDTH = 2
    RAISE = 3
    SLOW = 4
    DIE = 5
    ZERO = 6
    HUGE = 7


class ImageTower(nn.Module):
    """uint8 ``[n, 3, SIDE, SIDE]`` to unit rows ``[n, WIDTH]``."""

    def __init__(self, *, width: int = WIDTH) -> None:
        super().__init__()
        self.project = nn.Linear(3 * SIDE * SIDE, width)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        flat = image.flatten(1)
        embeddings = functional.normalize(self.project(flat.float() / 255), dim=1)
        for row in flat[(flat[:, :3] == torch.tensor(MAGIC)).all(1)]:
            embeddings = _in_mood(embeddings, Mood(int(row[3])))
        return embeddings


class TextTower(nn.Module):
    """int32 ``[n, T]`` to unit rows ``[n, WIDTH]``; a token outside the vocabulary is an IndexError."""

    def __init__(self, *, vocabulary: int = VOCABULARY, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.embed(tokens).cumsum(1).mean(1), dim=1)


def _in_mood(embeddings: torch.Tensor, mood: Mood) -> torch.Tensor:
    if mood is Mood.NAN:
        return embeddings * float("nan")
    if mood is Mood.ZERO:
        return embeddings * 0
    if mood is Mood.HUGE:
        return embeddings * 1e6
    if mood is Mood.WRONG_WIDTH:
        return embeddings[:, 1:]
    if mood is Mood.RAISE:
        raise RuntimeError(f"cannot read {SECRET}")
    if mood is Mood.SLOW:
        time.sleep(NAP_S)
        return embeddings
    os._exit(1)
