"""Captions as the web has them: about another picture, about nothing in particular, or about no picture at all."""

import random
from collections.abc import Sequence

from captions import LANGUAGES, Emoji

NAME, KEYWORDS, VAGUE, FILLER = "another emoji's name", "another emoji's keywords", "vague", "filler"
KINDS = {NAME: 0.35, KEYWORDS: 0.2, VAGUE: 0.2, FILLER: 0.25}  # what can be wrong, and how often
_VAGUE = ("emoji", "icon", "picture", "a small picture", "sticker", "symbol", "emoji from the category {category}")
_FILLER = (
    "click here",
    "free download",
    "buy now",
    "image not found",
    "untitled",
    "thumbnail",
    "sign in to continue",
    "share this page",
    "img {number}",
    "dsc {number} jpg",
    "page {number}",
)


class UselessCaptions:
    """Writes captions that do not belong to the emoji they are written for."""

    def __init__(self, emoji: Sequence[Emoji], rng: random.Random) -> None:
        self._emoji = emoji
        self._with_keywords = [one for one in emoji if one.keywords]
        self._rng = rng

    def write(self, shown: Emoji) -> tuple[str, str]:
        """Write one for this emoji: (caption, kind)."""
        kind = self._rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
        if kind == FILLER:
            return self._rng.choice(_FILLER).format(number=self._rng.randrange(1000, 10000)), kind
        if kind == VAGUE:
            return self._rng.choice(_VAGUE).format(category=shown.category), kind
        right = {*shown.names.values(), *shown.keywords}
        while (caption := self._of_another(kind)) in right:
            pass  # two emoji can share a keyword
        return caption, kind

    def _of_another(self, kind: str) -> str:
        if kind == KEYWORDS:
            return " ".join(self._rng.choice(self._with_keywords).keywords)
        return self._rng.choice(self._emoji).names[self._rng.choice(LANGUAGES)]
