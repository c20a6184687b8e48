"""What a selection allocates, seen operation by operation."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jest_core import SelectionPolicy, select_sub_batch
from jest_core_samples import random_embeddings

B, D = 20_000, 64


class LargestResult(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def test_no_tensor_of_a_selection_is_larger_than_the_embeddings():
    learner, reference = random_embeddings(B, seed=1, width=D), random_embeddings(B, seed=2, width=D)
    policy = SelectionPolicy(filter_ratio=0.8, num_chunks=16)
    with LargestResult() as largest:
        select_sub_batch(learner, reference, policy, seed=0)
    chunk = 4000 // 16
    assert largest.elements <= B * D < B * chunk


def test_the_meter_would_see_a_dense_matrix():
    model = random_embeddings(1000, seed=1, width=4)
    with LargestResult() as largest:
        torch.mm(model.image, model.text.T)
    assert largest.elements == 1_000_000
