"""Small pictures with captions, as files and in WebDataset tars."""

from __future__ import annotations

import io
import tarfile

import numpy as np
from PIL import Image


def png(seed):
    """A picture that is its own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path, count, *, first=0, more=None):
    """Writes examples `000000` and so on, each a picture and a caption, and whatever else by name."""
    files = {}
    for number in range(first, first + count):
        files |= {f"{number:06d}.png": png(number), f"{number:06d}.txt": f"caption {number}".encode()}
    with tarfile.open(path, "w") as tar:
        for name, data in (files | (more or {})).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
