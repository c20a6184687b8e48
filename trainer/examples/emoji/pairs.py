"""A fixed list of image-text pairs, ready to be gathered into batches.

Shapes: n = pairs of a batch, T = words of a caption.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypedDict

import torch
from torch import Tensor
from words import Vocabulary

CLEAN = "clean"


class Batch(TypedDict):
    """Some pairs: n example keys, image uint8 ``[n, 3, 32, 32]``, tokens int32 ``[n, T]``, rows int64 ``[n]``."""

    keys: list[str]
    image: Tensor
    tokens: Tensor
    index: Tensor


@dataclass(frozen=True)
class Pair:
    """A picture with a caption.

    Attributes:
        picture: row of the pictures.
        shows: English name of what is drawn.
        caption: what the pair says it is.
        kind: CLEAN or what is wrong with the caption. For the report: who trains or selects never sees it.
    """

    picture: int
    shows: str
    caption: str
    kind: str = CLEAN


class Pairs:
    """Pairs with their pixels, tokens and example keys.

    Two pairs have the same key exactly if they show the same drawing under the same caption.
    """

    def __init__(self, pairs: Iterable[Pair], pictures: Tensor, picture_ids: list[str], vocabulary: Vocabulary) -> None:
        self.pairs = list(pairs)
        self.keys = [example_key(picture_ids[pair.picture], pair.caption) for pair in self.pairs]
        self.tokens = vocabulary.tokenize([pair.caption for pair in self.pairs])
        self._pictures = pictures
        self._picture_of = torch.tensor([pair.picture for pair in self.pairs])

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

    def everything(self) -> Batch:
        """Gather all pairs in order."""
        return self.batch(torch.arange(len(self)))


def example_key(picture_id: str, caption: str) -> str:
    """Digest what a pair shows and says: 32 hex digits, the same for every duplicate of the pair."""
    return blake2b(f"{picture_id}\n{caption}".encode(), digest_size=16).hexdigest()


def take(batch: Batch, rows: Tensor) -> Batch:
    """Keep these rows of a batch, in this order."""
    return Batch(
        keys=[batch["keys"][row] for row in rows.tolist()],
        image=batch["image"][rows],
        tokens=batch["tokens"][rows],
        index=batch["index"][rows],
    )
