"""JEST, the method: which sub-batch of a super-batch is jointly most worth training on.

Pure functions of tensors (arXiv 2406.17711): no I/O, no clock, no global randomness. The same inputs and
the same seed give the same positions wherever they run.
"""

from jest_core.counter_rng import selection_seed
from jest_core.joint import conditional_logits, select_sub_batch
from jest_core.policy import SelectionPolicy
from jest_core.schedules import Schedule
from jest_core.types import Embeddings, ExampleLosses, PairLosses, Selection

__all__ = [
    "Embeddings",
    "ExampleLosses",
    "PairLosses",
    "Schedule",
    "Selection",
    "SelectionPolicy",
    "conditional_logits",
    "select_sub_batch",
    "selection_seed",
]
