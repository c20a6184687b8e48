"""A selection uses the cores that torch may use, and leaves nothing of that behind in the process."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from jest_core import PairLosses, Selection, SelectionPolicy, select_sub_batch
from jest_core_samples import random_embeddings, random_pair

PAIR = random_pair(3000, seed=41)
LOSSES = pytest.mark.parametrize("loss", ["sigmoid", "softmax"])


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def selected(loss: str, seed: int) -> Selection:
    policy = SelectionPolicy(loss=loss, filter_ratio=0.75, num_chunks=5, weights=True)
    return select_sub_batch(*PAIR, policy, seed=seed)


def in_a_new_thread(function: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@LOSSES
def test_threads_that_start_later_may_use_as_many_cores_as_before(loss):
    assert in_a_new_thread(torch.get_num_threads) == 3
    selected(loss, seed=1)
    assert torch.get_num_threads() == 3
    assert in_a_new_thread(torch.get_num_threads) == 3


@LOSSES
def test_selections_in_several_threads_at_once_do_not_disturb_each_other(loss):
    expected = [selected(loss, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: selected(loss, seed), range(4)))
    for alone, beside in zip(expected, together, strict=True):
        assert torch.equal(alone.positions, beside.positions)
        assert torch.equal(alone.weights, beside.weights)


@LOSSES
def test_no_thread_outlives_its_selection(loss):
    before = set(threading.enumerate())
    selected(loss, seed=1)
    assert set(threading.enumerate()) <= before


def test_an_error_in_one_tile_is_raised_and_ends_all_threads():
    losses = PairLosses(torch.ones(3000, 3000))
    losses.values[2990, :2990] = torch.nan
    policy = SelectionPolicy(loss="pairwise", filter_ratio=0.75, num_chunks=5)
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="pair losses must be finite"):
        select_sub_batch(losses, random_embeddings(3000, seed=1), policy, seed=0)
    assert set(threading.enumerate()) <= before
