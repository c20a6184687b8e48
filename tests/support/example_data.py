"""Small data sets on disk, as `jest-server embed` reads them, and a preprocessing for the tiny reference model."""

from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jest_server.examples.decoding import Example

SIDE = 32


def png(seed: int, *, side: int = SIDE) -> bytes:
    """Returns a picture that depends on the seed."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """Writes members in their order; names may repeat."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def example_members(keys: Sequence[str]) -> list[tuple[str, bytes]]:
    """Returns a picture and a caption for each key."""
    return [
        member for key in keys for member in ((f"{key}.png", png(hash_of(key))), (f"{key}.txt", f"a {key}".encode()))
    ]


def hash_of(key: str) -> int:
    """A number that depends on the key, the same in every process."""
    return int.from_bytes(key.encode()[-6:], "big")


def tiny_inputs(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Makes the inputs of the stack's tiny reference model."""
    pictures = [np.asarray(example.image.convert("RGB").resize((SIDE, SIDE))) for example in examples]
    tokens = [[hash_of(example.caption) % 1000, len(example.caption)] for example in examples]
    return {"image": np.stack(pictures).transpose(0, 3, 1, 2).copy(), "tokens": np.array(tokens, np.int32)}
