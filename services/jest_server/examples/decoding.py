"""Pictures with captions, from the bytes of their files; whatever cannot be read is told with its reason."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from jest_server.examples.options import EmbedOptions

PICTURES = ("jpg", "jpeg", "png", "webp")
_FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class Example:
    """What a preprocessing function gets of each example."""

    key: str
    """As the trainers name it."""
    image: Image.Image
    """Decoded, in the mode of its file: `.convert("RGB")` is the function's to call."""
    caption: str


@dataclass(frozen=True)
class LeftOut:
    """An example that has no embeddings; ``reason`` is one of few, the rest is for whoever looks into it."""

    key: str
    reason: str
    detail: str = ""


@dataclass
class RawExample:
    """The files of one example: by extension, what they hold, or why that was not read."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    problem: LeftOut | None = None


def split_name(path: str) -> tuple[str, str]:
    """Splits a file's name as WebDataset does, at the first dot after the last slash: example and extension."""
    folder, slash, name = path.rpartition("/")
    base, _, extension = name.partition(".")
    return folder + slash + base, extension.lower()


def is_wanted(extension: str, caption: str) -> bool:
    """Whether files of this extension are read; ``caption`` as in the options."""
    return extension in PICTURES or extension == caption.partition(":")[0]


def example_of(raw: RawExample, options: EmbedOptions, *, shard: str) -> Example | LeftOut:
    """Decodes one example, or tells why it cannot be."""
    if raw.problem is not None:
        return raw.problem
    try:
        return Example(_key(raw.key, options, shard), _picture(raw.files), _caption(raw.files, options.caption))
    except _CannotBe as error:
        return LeftOut(raw.key[:200], *error.args)


class _CannotBe(Exception):
    """No example, for a reason and with details."""


def _key(key: str, options: EmbedOptions, shard: str) -> str:
    try:
        return options.example_key(key=key, shard=shard)
    except ValueError as error:
        raise _CannotBe("key too long", str(error)) from error


def _caption(files: dict[str, bytes], option: str) -> str:
    form, _, json_field = option.partition(":")
    if form not in files:
        raise _CannotBe("no caption", f"has no .{form}")
    try:
        text = files[form].decode()
        fields = json.loads(text) if json_field else None
    except ValueError as error:
        raise _CannotBe("caption unreadable", str(error)[:200]) from error
    if not json_field:
        return text
    caption = fields.get(json_field) if isinstance(fields, dict) else None
    if not isinstance(caption, str):
        raise _CannotBe("caption unreadable", f"{json_field} is {str(caption)[:100]}, expected a string")
    return caption


def _picture(files: dict[str, bytes]) -> Image.Image:
    pictures = [data for extension, data in files.items() if extension in PICTURES]
    if len(pictures) != 1:
        raise _CannotBe("not one picture", f"has {len(pictures)}, expected one {', '.join(PICTURES)}")
    try:
        with warnings.catch_warnings():
            # Small files that decode to giant pictures: Pillow warns before it raises.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(pictures[0]), formats=_FORMATS)
            image.load()
    except Exception as error:
        raise _CannotBe("picture unreadable", repr(error)[:200]) from error
    return image
