"""Selection for a training loop whose DataLoader is made elsewhere: as the DataLoader's batch sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from jest_trainer._loop.loader_shape import LoaderShape
from jest_trainer.loader import SelectedBatches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Batch = TypeVar("Batch")


class SelectedIndices(LoaderShape):
    """A batch sampler: for each sub-batch the indices of its rows, so that a DataLoader loads only what was chosen.

    The choice needs what `loop`'s `embed` returns for *all* rows of a super-batch, so this saves loading only where
    that costs less than the examples themselves:

    - `loop` runs over a batch sampler, and its functions take lists of indices: for learner outputs that lie in tables,
      such as the losses of an earlier epoch under `per_example`. An `embed` that runs the learner has to load all rows
      itself, in the loop's thread.
    - `loop` runs over a DataLoader of smaller versions of the examples with a column of indices: the learner scores
      those with its current weights and trains on the full ones.

    A DataLoader with workers asks for `num_workers * prefetch_factor` sub-batches ahead, so `embed` works with weights
    that are as many steps old, and `loop.state_dict()` is as far ahead. Decisions do not travel through a DataLoader:
    for weights or reference embeddings iterate `SelectedBatches.with_decisions()` instead. Each rank has a loop of its
    own, and so indices of its own: nothing may divide them between ranks again.

    Args:
        loop: the selection; a pass over the indices is a pass over it.
        indices: reads the dataset's index of each row of a sub-batch; None if the sub-batches are the indices.

    Raises:
        ValueError: an argument is of another kind.
    """

    def __init__(self, loop: SelectedBatches[Batch], indices: Callable[[Batch], Iterable[Any]] | None = None) -> None:
        if not isinstance(loop, SelectedBatches):
            raise ValueError(f"loop must be a SelectedBatches, not {type(loop).__name__}")  # noqa: TRY004 - bad input is always ValueError
        if indices is not None and not callable(indices):
            raise ValueError(f"indices must be a function of a sub-batch or None, not {type(indices).__name__}")
        super().__init__(loop)
        self._indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._wrapped:
            yield _index_list(batch if self._indices is None else self._indices(batch))


def _index_list(indices: Any) -> list[int]:
    values = indices.tolist() if isinstance(indices, torch.Tensor | np.ndarray) else indices
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(  # noqa: TRY004 - as above
            f"a sub-batch's indices must be a sequence of integers, not {type(indices).__name__}; "
            "give SelectedIndices the function `indices` that reads them"
        )
    for row, index in enumerate(values):
        if isinstance(index, bool) or not isinstance(index, int | np.integer):
            raise ValueError(f"indices[{row}] ({index!r}) must be an integer, not {type(index).__name__}")  # noqa: TRY004 - as above
    return [int(index) for index in values]
