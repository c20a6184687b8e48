from __future__ import annotations

import pytest
from torch import distributed

from jest_trainer._loop.distributed import resolve_rank, resolve_world_size


@pytest.fixture
def group_of_three(monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(distributed, "get_rank", lambda: 2)


def test_a_process_without_a_group_is_alone():
    assert (resolve_world_size(None), resolve_rank(None, 1)) == (1, 0)


def test_what_the_caller_says_holds():
    assert (resolve_world_size(4), resolve_rank(3, 4)) == (4, 3)


def test_a_group_says_it_otherwise(group_of_three):
    assert (resolve_world_size(None), resolve_rank(None, 3)) == (3, 2)


def test_what_the_caller_says_holds_within_a_group(group_of_three):
    assert (resolve_world_size(1), resolve_rank(0, 1)) == (1, 0)


def test_a_group_of_another_size_does_not_guess_the_rank(group_of_three):
    with pytest.raises(ValueError, match=r"rank must be given: the job has 2 ranks, torch\.distributed 3"):
        resolve_rank(None, 2)


def test_many_ranks_without_a_group_need_to_be_told_which():
    with pytest.raises(ValueError, match=r"rank must be given: the job has 2 ranks, torch\.distributed is not init"):
        resolve_rank(None, 2)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank \({rank}\) must lie in \[0, 2\)"):
        resolve_rank(rank, 2)
