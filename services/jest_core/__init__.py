"""JEST, the method: which sub-batch of a super-batch is jointly most worth training on.

Pure functions of tensors (arXiv 2406.17711): no I/O, no clock, no global randomness. The same inputs and
the same seed give the same positions wherever they run.

What needs torch is imported when it is asked for: to check a policy, a process need not have it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jest_core.policy import SelectionPolicy
from jest_core.schedules import Schedule

if TYPE_CHECKING:
    from jest_core.counter_rng import selection_seed
    from jest_core.joint import conditional_logits, select_sub_batch
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
_NEEDS_TORCH = {
    "Embeddings": "types",
    "ExampleLosses": "types",
    "PairLosses": "types",
    "Selection": "types",
    "conditional_logits": "joint",
    "select_sub_batch": "joint",
    "selection_seed": "counter_rng",
}


def __getattr__(name: str) -> Any:
    """Imports a name that needs torch (PEP 562)."""
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
    globals()[name] = value
    return value
