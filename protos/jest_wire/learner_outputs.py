"""What a learner sends: the kind of outputs under each loss, the names of their tensors, the tiles of pair losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from jest_wire.tensors import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from jest_core import SelectionPolicy

Kind = Literal["embeddings", "pair_losses", "example_losses"]
OUTPUT_KINDS: Mapping[str, Kind] = {
    "sigmoid": "embeddings",
    "softmax": "embeddings",
    "pairwise": "pair_losses",
    "per_example": "example_losses",
}
"""By loss: which of the header's `outputs` a learner sends."""

EMBEDDINGS = IMAGE_EMBEDDING, TEXT_EMBEDDING = "image_embedding", "text_embedding"
LEARNER_LOSS, REFERENCE_LOSS = "learner_loss", "reference_loss"


def example_loss_names(policy: SelectionPolicy) -> list[str]:
    """Return the names of the losses of single examples that the scoring needs."""
    needed = ((LEARNER_LOSS, policy.scores_learner), (REFERENCE_LOSS, policy.scores_reference))
    return [name for name, counts in needed if counts]


class Tile(NamedTuple):
    """A rectangle of a rank's matrix of pair losses: where it starts and how large it is."""

    row: int
    column: int
    rows: int
    columns: int

    def __str__(self) -> str:
        return (
            f"rows {self.row} to {self.row + self.rows - 1}, columns {self.column} to {self.column + self.columns - 1}"
        )


def tiles(rows: int, columns: int, itemsize: int) -> Iterator[Tile]:
    """Cover a matrix, in row-major order, with tiles of at most one chunk: as many whole rows as fit, or parts of one.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        itemsize: bytes of an element.
    """
    elements = CHUNK_BYTES // itemsize
    width = min(columns, elements)
    height = elements // width
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield Tile(row, column, min(height, rows - row), min(width, columns - column))
