"""The order as a simulation without clock and threads, then the scheduler on a real event loop with real threads."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jest_server.domain.errors import Stopping
from jest_server.selector.decide.scheduler import FairQueue, SelectionScheduler

LARGE, SMALL = 1000.0, 1.0


def in_order(queue, count=None):
    """Starts one piece after the other and returns their items."""
    items = []
    while (first := queue.first()) is not None and len(items) != count:
        queue.start(first)
        items.append(first.item)
    return items


def filled(*pieces):
    """A queue of (job, cost) pieces that all came at once; their items are numbered for each job."""
    queue, numbers = FairQueue(), Counter()
    for job, cost in pieces:
        queue.add(job, cost, f"{job}{numbers[job]}")
        numbers[job] += 1
    return queue


def test_work_of_one_job_starts_as_it_came_whatever_it_costs():
    assert in_order(filled(("a", LARGE), ("a", SMALL), ("a", LARGE))) == ["a0", "a1", "a2"]


def test_a_small_jobs_work_passes_all_but_the_running_one_of_ten_large():
    queue = filled(*[("large", LARGE)] * 10)
    started = in_order(queue, 1)
    queue.add("small", SMALL, "small0")
    assert started + in_order(queue, 2) == ["large0", "small0", "large1"]


def test_equal_jobs_take_turns():
    queue = filled(*[("a", LARGE)] * 3, *[("b", LARGE)] * 3)
    assert in_order(queue) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_a_job_of_small_pieces_gets_as_much_work_done_as_one_of_large_pieces():
    queue = filled(*[("large", 10.0)] * 3, *[("small", 1.0)] * 30)
    order = in_order(queue)
    assert [order.index(f"large{i}") for i in range(3)] == [0, 11, 22]


def test_a_job_gets_no_credit_for_having_been_idle():
    queue = filled(*[("busy", 10.0)] * 10)
    in_order(queue, 5)
    for number in range(30):
        queue.add("back", 1.0, f"back{number}")
    order = in_order(queue)
    assert order[10:12] == ["busy5", "back10"], "the share from now on, not from the start"


def test_a_job_that_comes_and_goes_has_no_more_than_its_share():
    queue = filled(*[("busy", 10.0)] * 4)
    order = []
    for number in range(4):
        order += in_order(queue, 1)
        queue.add("comes and goes", 10.0, f"visit{number}")
    assert order + in_order(queue) == ["busy0", "visit0", "busy1", "visit1", "busy2", "visit2", "busy3", "visit3"]


def test_work_taken_back_costs_its_job_nothing():
    queue = filled(("a", SMALL))
    dear = queue.add("b", LARGE, "dear")
    queue.add("b", SMALL, "b0")
    queue.add("a", SMALL, "a1")
    queue.take_back(dear)
    assert in_order(queue) == ["a0", "b0", "a1"]


def test_taking_back_what_is_not_there_any_more_changes_nothing():
    queue = filled(("a", SMALL), ("a", SMALL))
    first = queue.first()
    queue.start(first)
    queue.take_back(first)
    assert len(queue) == 1
    assert in_order(queue) == ["a1"]


def test_after_a_rest_nobody_pays_for_what_was_before():
    queue = filled(("greedy", LARGE))
    in_order(queue)
    queue.reset()
    queue.add("greedy", SMALL, "greedy0")
    queue.add("other", SMALL, "other0")
    assert in_order(queue) == ["greedy0", "other0"]


def test_jobs_that_are_long_gone_are_forgotten():
    queue = FairQueue()
    for number in range(1000):
        queue.add(f"one-off {number}", SMALL, "work")
        queue.add("steady", SMALL, "work")
        in_order(queue, 2)
    assert len(queue._turns._turns) + len(queue._turns._past) < 10


@pytest.mark.parametrize("cost", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cost_that_is_no_positive_number_is_refused(cost):
    with pytest.raises(ValueError, match=r"cost is .*, expected a finite number larger than 0"):
        FairQueue().add("a", cost, None)


costs = st.lists(st.integers(1, 100).map(float), min_size=1, max_size=30)


@given(st.lists(costs, min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_while_two_jobs_wait_their_work_differs_by_no_more_than_their_largest_pieces(jobs, random):
    pieces = [(str(job), cost) for job, line in enumerate(jobs) for cost in line]
    random.shuffle(pieces)
    queue, left, done = FairQueue(), Counter(), Counter()
    for job, cost in pieces:
        queue.add(job, cost, (job, cost))
        left[job] += 1
    largest = [max(line) for line in jobs]
    while all(left[str(job)] for job in range(len(jobs))):
        [(job, cost)] = in_order(queue, 1)
        done[job] += cost
        left[job] -= 1
        for one in range(len(jobs)):
            for other in range(one):
                assert abs(done[str(one)] - done[str(other)]) <= largest[one] + largest[other]


class Gate:
    """Work that says when it runs and goes on when it may."""

    def __init__(self, result=None):
        self.began, self.may_end = threading.Event(), threading.Event()
        self._result = result

    def __call__(self):
        self.began.set()
        assert self.may_end.wait(10)
        return self._result

    async def running(self):
        assert await asyncio.to_thread(self.began.wait, 10)


@pytest.fixture
async def scheduler():
    scheduler = SelectionScheduler(1)
    yield scheduler
    scheduler.close()


async def queued(scheduler, count):
    """Waits until so many pieces wait for their turn."""
    async with asyncio.timeout(10):
        while len(scheduler._queue) != count:
            await asyncio.sleep(0)


async def test_ten_large_selections_of_one_job_do_not_hold_up_a_small_one_of_another(scheduler):
    done, gate = [], Gate()
    running = asyncio.create_task(scheduler.run("large", LARGE, gate))
    large = [asyncio.create_task(scheduler.run("large", LARGE, lambda: done.append("large"))) for _ in range(9)]
    await gate.running()
    small = asyncio.create_task(scheduler.run("small", SMALL, lambda: done.append("small")))
    await queued(scheduler, 10)
    gate.may_end.set()
    await asyncio.gather(running, small, *large)
    assert done == ["small", *["large"] * 9]


async def test_the_result_reaches_the_caller(scheduler):
    assert await scheduler.run("a", SMALL, lambda: 42) == 42


async def test_an_error_reaches_its_caller_and_nobody_else(scheduler):
    def fails():
        raise KeyError("lost")

    failing, working = scheduler.run("a", SMALL, fails), scheduler.run("a", SMALL, lambda: "done")
    error, result = await asyncio.gather(failing, working, return_exceptions=True)
    assert isinstance(error, KeyError)
    assert result == "done"


async def test_work_sees_the_callers_context(scheduler):
    job = contextvars.ContextVar("job")
    gate = Gate()
    job.set("first")
    first = asyncio.create_task(scheduler.run("a", SMALL, gate))
    job.set("second")
    second = asyncio.create_task(scheduler.run("a", SMALL, lambda: job.get()))  # noqa: PLW0108 - looked up when it runs
    await gate.running()
    gate.may_end.set()
    assert [await first, await second] == [None, "second"]


async def test_a_cancelled_callers_waiting_work_is_never_done(scheduler):
    done, gate = [], Gate()
    running = asyncio.create_task(scheduler.run("a", SMALL, gate))
    waiting = asyncio.create_task(scheduler.run("a", SMALL, lambda: done.append("cancelled")))
    await gate.running()
    await queued(scheduler, 1)
    waiting.cancel()
    gate.may_end.set()
    await running
    await scheduler.run("a", SMALL, lambda: done.append("later"))
    assert waiting.cancelled()
    assert done == ["later"]


async def test_work_whose_caller_is_cancelled_in_the_turn_that_would_start_it_is_never_done(scheduler):
    done, gate = [], Gate()
    running = asyncio.create_task(scheduler.run("a", SMALL, gate))
    waiting = asyncio.create_task(scheduler.run("a", SMALL, lambda: done.append("cancelled")))
    await queued(scheduler, 1)
    scheduler._queue.first().item.answer.cancel()
    gate.may_end.set()
    await running
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert done == []


async def test_running_work_of_a_cancelled_caller_goes_on_to_its_end_and_the_next_is_served(scheduler):
    gate = Gate()
    abandoned = asyncio.create_task(scheduler.run("a", SMALL, gate))
    await gate.running()
    abandoned.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    after = asyncio.create_task(scheduler.run("a", SMALL, lambda: "served"))
    await queued(scheduler, 1)
    gate.may_end.set()
    assert await after == "served"


async def test_an_error_that_nobody_waits_for_harms_nobody(scheduler):
    gate = Gate()

    def fails():
        gate()
        raise KeyError("lost")

    abandoned = asyncio.create_task(scheduler.run("a", SMALL, fails))
    await gate.running()
    abandoned.cancel()
    gate.may_end.set()
    assert await scheduler.run("a", SMALL, lambda: "served") == "served"


async def test_as_many_selections_run_at_once_as_there_are_threads():
    scheduler = SelectionScheduler(2)
    gates = [Gate(0), Gate(1), Gate(2)]
    calls = [asyncio.create_task(scheduler.run("a", SMALL, gate)) for gate in gates]
    await gates[0].running()
    await gates[1].running()
    await queued(scheduler, 1)
    assert not gates[2].began.is_set()
    for gate in gates:
        gate.may_end.set()
    assert await asyncio.gather(*calls) == [0, 1, 2]
    scheduler.close()


async def test_closing_fails_what_waits_lets_what_runs_finish_and_refuses_what_comes():
    scheduler, gate = SelectionScheduler(1), Gate("finished")
    running = asyncio.create_task(scheduler.run("a", SMALL, gate))
    waiting = asyncio.create_task(scheduler.run("a", SMALL, lambda: "never"))
    await gate.running()
    await queued(scheduler, 1)
    gate.may_end.set()
    scheduler.close()
    with pytest.raises(Stopping):
        await waiting
    assert await running == "finished"
    with pytest.raises(Stopping):
        await scheduler.run("a", SMALL, lambda: "never")
