"""Image-text pairs as the web has them, out of emoji: a duplicated head, half of the captions useless.

Every emoji is drawn by two vendors. Of some emoji one drawing is held out: it is in no training pair, under no
caption, and retrieval is measured on it. All other drawings make

- a *curated* part, small and clean, that only the reference model is trained on;
- a *stream* that both learners are trained on: emoji come by Zipf's law, each with one of its twelve pairs, and six of
  the twelve have a caption that belongs to another emoji, says next to nothing, or is web filler.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from captions import LANGUAGES, Emoji, load_emoji
from noise import UselessCaptions
from pairs import Batch, Pair, Pairs
from pictures import PREPROCESSING_ID, VENDORS, load_pictures
from torch import Tensor
from words import Vocabulary

CLEAN_PER_EMOJI = 6
USELESS_PER_EMOJI = 6
ZIPF_EXPONENT = 1.0
HELD_OUT_SHARE = {"validation": 0.1, "test": 0.2}


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
        """How these pixels and tokens were made: embeddings of others must not be mixed with theirs."""
        return f"{PREPROCESSING_ID}+{self.vocabulary.id}"

    def stream_batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Read the stream for ever, `size` pairs at a time, with all its duplicates."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.stream.batch(torch.multinomial(self.stream_weights, size, replacement=True, generator=generator))

    def curated_batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Read the curated part for ever, in a new random order every time; what does not fill a batch is left."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.curated), generator=generator)
            for start in range(0, len(order) - size + 1, size):
                yield self.curated.batch(order[start : start + size])


def prepare(
    cache_dir: Path, seed: int, curated_pairs: int, progress: Callable[[int, int], None] | None = None
) -> EmojiData:
    """Build all parts; the same seed gives the same pairs in the same order.

    Args:
        cache_dir: where the drawn pictures are kept between runs.
        seed: decides what is held out, which emoji are popular and which captions are useless.
        curated_pairs: size of the clean part.
        progress: told (pictures drawn, pictures in all).

    Raises:
        ValueError: There are fewer clean pairs than `curated_pairs`.
    """
    emoji = load_emoji()
    pictures = load_pictures([one.code_points for one in emoji], cache_dir, progress).flatten(0, 1)
    picture_ids = [f"{vendor.name}/{one.code_points}" for one in emoji for vendor in VENDORS]
    splitter = _Splitter(emoji, seed)
    held_out = splitter.hold_out()
    curated, stream = splitter.curated(curated_pairs), splitter.stream()
    parts = (curated, stream, *held_out.values())
    vocabulary = Vocabulary(pair.caption for part in parts for pair in part)

    def ready(part: list[Pair]) -> Pairs:
        return Pairs(part, pictures, picture_ids, vocabulary)

    return EmojiData(
        vocabulary=vocabulary,
        curated=ready(curated),
        stream=ready(stream),
        stream_weights=splitter.popularity(stream),
        validation=ready(held_out["validation"]),
        test=ready(held_out["test"]),
    )


class _Splitter:
    """Decides who goes where. Every part has its own randomness, so that one's size does not move another."""

    def __init__(self, emoji: Sequence[Emoji], seed: int) -> None:
        self._emoji = emoji
        self._seed = seed
        self._training = [list(range(row * len(VENDORS), (row + 1) * len(VENDORS))) for row in range(len(emoji))]

    def hold_out(self) -> dict[str, list[Pair]]:
        """Take one drawing of each chosen emoji out of training, named as no other held-out drawing is."""
        rng = self._rng("held out")
        rows = iter(rng.sample(range(len(self._emoji)), len(self._emoji)))
        taken: set[str] = set()
        parts: dict[str, list[Pair]] = {}
        for part, share in HELD_OUT_SHARE.items():
            parts[part] = []
            for row in itertools.islice(rows, int(share * len(self._emoji))):
                picture = self._training[row].pop(rng.randrange(len(VENDORS)))
                names = self._emoji[row].names
                languages = rng.sample(LANGUAGES, len(LANGUAGES))
                name = next(names[language] for language in languages if names[language] not in taken)
                taken.add(name)
                parts[part].append(Pair(picture, names["en"], name))
        return parts

    def curated(self, size: int) -> list[Pair]:
        """Sample among all drawings in training, under their names in every language."""
        named = [
            Pair(picture, one.names["en"], name)
            for one, pictures in zip(self._emoji, self._training, strict=True)
            for picture in pictures
            for name in one.names.values()
        ]
        if size > len(named):
            raise ValueError(f"curated_pairs ({size}) is larger than the number of clean pairs ({len(named)})")
        return self._rng("curated").sample(named, size)

    def stream(self) -> list[Pair]:
        """List the twelve pairs of every emoji."""
        rng = self._rng("stream")
        useless = UselessCaptions(self._emoji, rng)
        pairs: list[Pair] = []
        for one, pictures in zip(self._emoji, self._training, strict=True):
            shows = one.names["en"]
            captions = dict.fromkeys([*one.names.values(), *one.keywords])
            right = list(itertools.product(pictures, captions))
            pairs += [
                Pair(picture, shows, caption)
                for picture, caption in rng.sample(right, min(CLEAN_PER_EMOJI, len(right)))
            ]
            pairs += [Pair(rng.choice(pictures), shows, *useless.write(one)) for _ in range(USELESS_PER_EMOJI)]
        return pairs

    def popularity(self, stream: Sequence[Pair]) -> Tensor:
        """Weigh pairs: Zipf's law over emoji in random order, an emoji's share spread evenly over its pairs."""
        ranks = self._rng("popularity").sample(range(1, len(self._emoji) + 1), len(self._emoji))
        rows = torch.tensor([pair.picture // len(VENDORS) for pair in stream])
        pairs_of_row = torch.bincount(rows, minlength=len(self._emoji))
        return (torch.tensor(ranks, dtype=torch.float64) ** -ZIPF_EXPONENT / pairs_of_row)[rows]

    def _rng(self, part: str) -> random.Random:
        return random.Random(f"{part}/{self._seed}")  # noqa: S311 - a repeatable data set, no secret
