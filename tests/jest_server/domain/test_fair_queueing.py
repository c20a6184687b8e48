"""StartTimeFairQueue by itself; stores/test_fair_queueing_contract.py covers the order in which shards are claimed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jest_server.domain.fair_queueing import StartTimeFairQueue


def served(weights, takes):
    """Counts the turns of jobs that always wait."""
    turns = StartTimeFairQueue()
    for job in weights:
        turns.join(job)
    count = Counter()
    for _ in range(takes):
        job = turns.first()
        turns.take(job, cost=1 / weights[job])
        count[job] += 1
    return count


WEIGHTS = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.floats(0.1, 10), min_size=1, max_size=8)


@given(weights=WEIGHTS)
def test_shares_are_the_weights_over_ten_thousand_takes(weights):
    count, total = served(weights, 10_000), sum(weights.values())
    for job, weight in weights.items():
        expected = 10_000 * weight / total
        assert abs(count[job] - expected) <= max(0.05 * expected, len(weights))


@given(weights=WEIGHTS, takes=st.integers(1, 200))
def test_no_two_jobs_that_wait_are_ever_further_apart_than_one_turn_of_each(weights, takes):
    count = served(weights, takes)
    given_ = {job: count[job] / weight for job, weight in weights.items()}
    for one, first in weights.items():
        for other, second in weights.items():
            assert given_[one] - given_[other] <= 1 / first + 1 / second + 1e-9


def test_a_job_that_was_away_gets_no_credit_for_it():
    turns = StartTimeFairQueue()
    turns.join("busy")
    for _ in range(100):
        turns.take("busy", cost=1)
    turns.join("late")
    order = []
    for _ in range(6):
        order.append(turns.first())
        turns.take(order[-1], cost=1)
    assert order == ["late", "busy", "late", "busy", "late", "busy"]


def test_who_leaves_and_comes_back_does_not_jump_the_queue():
    turns = StartTimeFairQueue()
    turns.join("a")
    turns.join("b")
    turns.take("a", cost=10)
    turns.leave("a")
    turns.join("a")
    assert [turns.of("a"), turns.of("b"), turns.first()] == [10, 0, "b"]


def test_equal_turns_go_by_name():
    turns = StartTimeFairQueue()
    turns.join("b")
    turns.join("a")
    assert turns.first() == "a"


def test_nobody_is_first_where_nobody_waits():
    turns = StartTimeFairQueue()
    assert turns.first() is None
    turns.join("a")
    turns.leave("a")
    assert turns.first() is None
    assert "a" not in turns


@pytest.mark.parametrize("cost", [0, -1, float("nan"), float("inf")])
def test_a_cost_that_is_none_is_refused(cost):
    turns = StartTimeFairQueue()
    turns.join("a")
    with pytest.raises(ValueError, match=rf"cost is {cost}, expected a finite number larger than 0"):
        turns.take("a", cost=cost)
