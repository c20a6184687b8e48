"""What a selection allocates, seen operation by operation."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jest_core import PairLosses, SelectionPolicy, select_sub_batch
from jest_core.tiles import TILE_COLUMNS, TILE_ROWS
from jest_core_samples import random_embeddings

pytestmark = pytest.mark.usefixtures("one_thread")

B, D = 8000, 64


class LargestResult(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, but for views of the tensors that were there before."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.elements = 0
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self._given:
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("float32", torch.bfloat16), ("bfloat16", torch.float32)]
)
def test_no_tensor_of_a_selection_is_larger_than_the_embeddings(loss, precision, dtype):
    learner, reference = (random_embeddings(B, seed=seed, width=D, dtype=dtype) for seed in (1, 2))
    policy = SelectionPolicy(loss=loss, filter_ratio=0.8, num_chunks=16, precision=precision)
    with LargestResult() as largest:
        select_sub_batch(learner, reference, policy, seed=0)
    chunk = 1600 // 16
    assert largest.elements <= B * D < B * chunk


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_weights_need_no_matrix_of_the_sub_batch(loss):
    kept = 3000
    learner, reference = random_embeddings(4000, seed=1, width=8), random_embeddings(4000, seed=2, width=8)
    policy = SelectionPolicy(loss=loss, sub_batch_size=kept, num_chunks=30, weights=True)
    with LargestResult() as largest:
        select_sub_batch(learner, reference, policy, seed=0)
    assert largest.elements <= TILE_ROWS * TILE_COLUMNS < kept * kept


def test_pair_losses_are_read_a_tile_at_a_time():
    size, kept = 4000, 800
    learner = PairLosses(torch.ones(1).expand(size, size))
    reference = random_embeddings(size, seed=1, width=8)
    policy = SelectionPolicy(loss="pairwise", sub_batch_size=kept, num_chunks=4, weights=True)
    with LargestResult(learner.values) as largest:
        select_sub_batch(learner, reference, policy, seed=0)
    assert largest.elements <= TILE_ROWS * kept < size * kept // 2


def test_the_meter_would_see_a_dense_matrix():
    model = random_embeddings(1000, seed=1, width=4)
    with LargestResult(model.image, model.text) as largest:
        torch.mm(model.image, model.text.T)
    assert largest.elements == 1_000_000
