"""Image-text pairs as the web has them, out of emoji: a duplicated head, half of the captions useless.

Every emoji is drawn by two vendors. Of some emoji one drawing is held out: it is in no training pair, under no
caption, and retrieval is measured on it. All other drawings make

- a *curated* part, small and clean, that only the reference model is trained on;
- a *stream* that both learners are trained on: emoji are drawn by Zipf's law, each from a fixed pool of its pairs,
  half of them with a caption that belongs to another emoji, says next to nothing, or is web filler.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypedDict

import torch
from captions import LANGUAGES, Emoji, load_emoji
from pictures import PREPROCESSING_ID, VENDORS, load_pictures
from torch import Tensor
from words import Vocabulary

CLEAN_PER_EMOJI = 6
USELESS_PER_EMOJI = 6
ZIPF_EXPONENT = 1.0
HELD_OUT_SHARE = {"validation": 0.1, "test": 0.2}
KINDS = {  # what can be wrong with a caption, and how often
    "another emoji's name": 0.35,
    "another emoji's keywords": 0.2,
    "vague": 0.2,
    "filler": 0.25,
}
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
_VAGUE = ("emoji", "icon", "picture", "a small picture", "sticker", "symbol", "emoji from the category {category}")


class Batch(TypedDict):
    """Some pairs: n example keys, image uint8 ``[n, 3, 32, 32]``, tokens int32 ``[n, T]``, pool rows int64 ``[n]``."""

    keys: list[str]
    image: Tensor
    tokens: Tensor
    index: Tensor


@dataclass(frozen=True)
class Pair:
    """A picture with a caption.

    Attributes:
        picture: row of the flattened pictures.
        shows: English name of what is drawn.
        caption: what the pair says it is.
        kind: "clean" or one of `KINDS`. For the report alone: nobody who trains or selects sees it.
    """

    picture: int
    shows: str
    caption: str
    kind: str


class Pairs:
    """A fixed list of pairs with their pixels, tokens and example keys.

    Two pairs have the same key exactly if they show the same drawing under the same caption.
    """

    def __init__(self, pairs: list[Pair], pictures: Tensor, picture_ids: list[str], vocabulary: Vocabulary) -> None:
        self.pairs = pairs
        self.keys = [example_key(picture_ids[pair.picture], pair.caption) for pair in pairs]
        self.tokens = vocabulary.tokenize([pair.caption for pair in pairs])
        self._pictures = pictures
        self._picture_of = torch.tensor([pair.picture for pair in pairs])

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, index: Tensor) -> Batch:
        """Gather the pairs at these rows."""
        return Batch(
            keys=[self.keys[row] for row in index.tolist()],
            image=self._pictures[self._picture_of[index]],
            tokens=self.tokens[index],
            index=index,
        )

    def pictures(self, rows: list[int]) -> Tensor:
        """Get the pictures of these pairs: uint8 ``[len(rows), 3, 32, 32]``."""
        return self._pictures[self._picture_of[rows]]

    def everything(self) -> Batch:
        """Gather all pairs in order."""
        return self.batch(torch.arange(len(self)))


@dataclass(frozen=True)
class EmojiData:
    """Everything the demo trains and measures on; see the module's first lines."""

    vocabulary: Vocabulary
    curated: Pairs
    stream: Pairs
    stream_weights: Tensor
    validation: Pairs
    test: Pairs

    @property
    def preprocessing_id(self) -> str:
        """What embeddings of these pictures and tokens must not be confused across."""
        return f"{PREPROCESSING_ID}+{self.vocabulary.id}"

    def stream_batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Read the stream for ever, `size` pairs at a time, with all its duplicates."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.stream.batch(torch.multinomial(self.stream_weights, size, replacement=True, generator=generator))

    def curated_batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Read the curated part for ever in random order, each pair once per pass."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(self.curated), generator=generator).split(size):
                if len(rows) == size:
                    yield self.curated.batch(rows)


def example_key(picture_id: str, caption: str) -> str:
    """Digest what a pair shows and says: 32 hex digits, the same for every duplicate of the pair."""
    return blake2b(f"{picture_id}\n{caption}".encode(), digest_size=16).hexdigest()


def prepare(
    cache_dir: Path, seed: int, curated_pairs: int, progress: Callable[[int, int], None] | None = None
) -> EmojiData:
    """Build all parts; the same seed gives the same pairs in the same order.

    Args:
        cache_dir: where the drawn pictures are kept between runs.
        seed: decides what is held out, which emoji are popular and which captions are useless.
        curated_pairs: size of the clean part.
        progress: told (pictures drawn, pictures in all).
    """
    emoji = load_emoji()
    pictures = load_pictures([one.code_points for one in emoji], cache_dir, progress).flatten(0, 1)
    picture_ids = [f"{vendor.name}/{one.code_points}" for one in emoji for vendor in VENDORS]
    return _Splitter(emoji, seed).split(pictures, picture_ids, curated_pairs)


class _Splitter:
    """Decides who goes where. Every part has its own randomness, so that one's size does not move another."""

    def __init__(self, emoji: list[Emoji], seed: int) -> None:
        self._emoji = emoji
        self._rng, self._curated_rng = (
            random.Random(f"{part}/{seed}")  # noqa: S311 - a repeatable data set, no secret
            for part in ("stream", "curated")
        )

    def split(self, pictures: Tensor, picture_ids: list[str], curated_pairs: int) -> EmojiData:
        held_out = self._hold_out()
        training = self._training_pictures({pair.picture for pairs in held_out.values() for pair in pairs})
        curated = self._curated(training, curated_pairs)
        stream = [pair for row in range(len(self._emoji)) for pair in self._stream_pairs(row, training[row])]
        parts = [curated, stream, *held_out.values()]
        vocabulary = Vocabulary(pair.caption for part in parts for pair in part)

        def pairs(part: list[Pair]) -> Pairs:
            return Pairs(part, pictures, picture_ids, vocabulary)

        return EmojiData(
            vocabulary=vocabulary,
            curated=pairs(curated),
            stream=pairs(stream),
            stream_weights=self._popularity(stream),
            validation=pairs(held_out["validation"]),
            test=pairs(held_out["test"]),
        )

    def _hold_out(self) -> dict[str, list[Pair]]:
        """One drawing of each chosen emoji, captioned with a name that no other held-out pair has."""
        rows = iter(self._rng.sample(range(len(self._emoji)), len(self._emoji)))
        taken: set[str] = set()
        parts = {}
        for part, share in HELD_OUT_SHARE.items():
            parts[part] = [
                Pair(row * len(VENDORS) + self._rng.randrange(len(VENDORS)), self._unused_name(row, taken), "clean")
                for row in itertools.islice(rows, int(share * len(self._emoji)))
            ]
        return parts

    def _unused_name(self, row: int, taken: set[str]) -> str:
        names = self._emoji[row].names
        languages = self._rng.sample(LANGUAGES, len(LANGUAGES))
        name = next(names[language] for language in languages if names[language] not in taken)
        taken.add(name)
        return name

    def _training_pictures(self, held_out: set[int]) -> list[list[int]]:
        per_emoji = [range(row * len(VENDORS), (row + 1) * len(VENDORS)) for row in range(len(self._emoji))]
        return [[picture for picture in pictures if picture not in held_out] for pictures in per_emoji]

    def _curated(self, training: list[list[int]], size: int) -> list[Pair]:
        named = [
            Pair(picture, name, "clean")
            for row, pictures in enumerate(training)
            for picture in pictures
            for name in self._emoji[row].names.values()
        ]
        if size > len(named):
            raise ValueError(f"curated_pairs ({size}) is larger than the number of clean pairs ({len(named)})")
        return self._curated_rng.sample(named, size)

    def _stream_pairs(self, row: int, pictures: list[int]) -> list[Pair]:
        right = list(itertools.product(pictures, [*self._emoji[row].names.values(), *self._emoji[row].keywords]))
        clean = [Pair(*pair, "clean") for pair in self._rng.sample(right, min(CLEAN_PER_EMOJI, len(right)))]
        kinds = self._rng.choices(list(KINDS), weights=list(KINDS.values()), k=USELESS_PER_EMOJI)
        useless = [Pair(self._rng.choice(pictures), self._useless_caption(kind, row), kind) for kind in kinds]
        return clean + useless

    def _useless_caption(self, kind: str, row: int) -> str:
        if kind == "filler":
            return self._rng.choice(_FILLER).format(number=self._rng.randrange(1000, 10000))
        if kind == "vague":
            return self._rng.choice(_VAGUE).format(category=self._emoji[row].category)
        other = self._another(row)
        if kind == "another emoji's keywords" and other.keywords:
            return " ".join(other.keywords)
        return other.names[self._rng.choice(LANGUAGES)]

    def _another(self, row: int) -> Emoji:
        return self._emoji[(row + self._rng.randrange(1, len(self._emoji))) % len(self._emoji)]

    def _popularity(self, stream: list[Pair]) -> Tensor:
        """Zipf's law over emoji in random order; an emoji's share is spread evenly over its pairs."""
        ranks = self._rng.sample(range(1, len(self._emoji) + 1), len(self._emoji))
        rows = torch.tensor([pair.picture // len(VENDORS) for pair in stream])
        pairs_of_row = torch.bincount(rows, minlength=len(self._emoji))
        return (torch.tensor(ranks, dtype=torch.float64) ** -ZIPF_EXPONENT / pairs_of_row)[rows]
