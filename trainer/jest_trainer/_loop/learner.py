"""The learner's forward pass over a super-batch, and the first look at what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jest_core import Embeddings
from jest_trainer.outputs import ExampleLosses, PairLosses, check_outputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from jest_core import SelectionPolicy
    from jest_trainer.outputs import LearnerOutputs


@torch.no_grad()
def embed_super_batch(
    embed: Callable[[Any], LearnerOutputs], super_batch: object, *, rows: int, policy: SelectionPolicy, world_size: int
) -> LearnerOutputs:
    """Run the learner without gradients.

    Raises:
        ValueError: what it gave is not what the job's policy wants, or not of `rows` rows.
    """
    returned = embed(super_batch)
    for found in _row_counts(returned):
        if found != rows:
            raise ValueError(f"embed returned {found} rows for a super-batch with {rows} keys")
    return check_outputs("what embed returned", returned, policy, world_size=world_size)


def _row_counts(outputs: object) -> list[int]:
    if isinstance(outputs, ExampleLosses):
        return [len(losses) for losses in (outputs.learner, outputs.reference) if losses is not None]
    return [len(outputs)] if isinstance(outputs, Embeddings | PairLosses) else []
