"""Captions to numbers: a vocabulary over all words of the captions, in every language."""

import unicodedata
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

PADDING = 0
UNKNOWN = 1
_FIRST_WORD = 2


class Vocabulary:
    """Numbers for words, in alphabetical order, so that the same captions always give the same numbers."""

    def __init__(self, captions: Iterable[str], max_words: int = 16) -> None:
        words = sorted({word for caption in captions for word in split_words(caption)})
        self.max_words = max_words
        self._numbers = {word: number for number, word in enumerate(words, start=_FIRST_WORD)}
        digest = blake2b("\n".join(words).encode(), digest_size=6).hexdigest()
        self.id = f"words-{max_words}-{digest}"

    def __len__(self) -> int:
        return len(self._numbers) + _FIRST_WORD

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Number the words of each caption: int32 ``[len(captions), max_words]``, padded with zeros, cut if longer."""
        tokens = torch.full((len(captions), self.max_words), PADDING, dtype=torch.int32)
        for row, caption in enumerate(captions):
            numbers = [self._numbers.get(word, UNKNOWN) for word in split_words(caption)[: self.max_words]]
            tokens[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
        return tokens


def split_words(caption: str) -> list[str]:
    """Lower-case words without punctuation; each Chinese, Japanese or Korean character stands alone."""
    spaced: list[str] = []
    for character in unicodedata.normalize("NFKC", caption).casefold():
        if unicodedata.category(character)[0] not in "LMN":  # letters, marks, numbers
            spaced.append(" ")
        elif _stands_alone(character):
            spaced.append(f" {character} ")
        else:
            spaced.append(character)
    return "".join(spaced).split()


def _stands_alone(character: str) -> bool:
    return unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL"))
