from __future__ import annotations

import threading

import pytest

from jest_trainer._loop.prefetch import Prefetch
from support.polling import within


def nothing():
    pass


def prefetch(items, work=lambda item: item, limit=2, waiting=None, cancel=nothing, drop=lambda _: None):
    waiting = waiting or threading.Event()
    return Prefetch(items, work, limit=limit, name="jest-test", waiting=waiting, cancel=cancel, drop=drop)


def test_results_come_in_order_and_then_end():
    with_double = prefetch(range(20), lambda item: item * 2)
    assert list(with_double) == [2 * item for item in range(20)]
    assert next(with_double, "end") == "end"


@pytest.mark.parametrize("limit", [1, 3])
def test_never_more_than_the_limit_is_pulled_ahead(limit, until):
    pulled = []
    results = prefetch((pulled.append(item) or item for item in range(10)), limit=limit)
    until(lambda: len(pulled) == limit)
    for taken in range(1, 4):
        next(results)
        until(lambda taken=taken: len(pulled) >= taken + limit)
        assert len(pulled) == taken + limit
    results.close()


def test_work_runs_in_another_thread_and_iter_in_this_one():
    class Items:
        def __iter__(self):
            self.iterated_in = threading.current_thread()
            return iter([1])

    items = Items()
    (worker,) = prefetch(items, lambda _item: threading.current_thread())
    assert items.iterated_in is threading.current_thread()
    assert worker is not threading.current_thread()


def test_an_error_of_the_iterable_comes_after_the_results_before_it():
    def items():
        yield 1
        raise OSError("disk on fire")

    results = prefetch(items())
    assert next(results) == 1
    with pytest.raises(OSError, match="disk on fire"):
        next(results)
    assert list(results) == []


def test_an_error_of_the_work_comes_out_and_ends_the_thread(until):
    results = prefetch([1, 0, 2], lambda item: 1 // item)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
    until(lambda: not results._thread.is_alive())


def test_an_iterable_that_exits_the_program_does_so_in_the_caller_s_thread():
    def items():
        raise SystemExit(3)
        yield

    with pytest.raises(SystemExit):
        next(prefetch(items()))


def test_closing_stops_the_thread_and_lets_the_iterable_go():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    results = prefetch(endless())
    next(results)
    results.close()
    assert not results._thread.is_alive()
    assert closed.is_set()


def test_closing_drops_what_was_ready_and_what_came_too_late(until):
    released, dropped = threading.Event(), []
    results = prefetch(
        [1, 2, 3],
        lambda item: item != 3 or released.wait(30),
        limit=3,
        cancel=released.set,
        drop=dropped.append,
    )
    assert next(results) is True
    until(lambda: len(results._ready) == 1)
    results.close()
    until(lambda: dropped == [True, True])


def test_what_was_taken_is_not_dropped():
    dropped = []
    results = prefetch([1, 2], drop=dropped.append)
    assert list(results) == [1, 2]
    results.close()
    assert dropped == []


def test_closing_twice_or_after_the_end_does_nothing():
    results = prefetch([1])
    assert list(results) == [1]
    results.close()
    results.close()


def test_closing_cancels_work_in_progress():
    cancelled = threading.Event()
    results = prefetch([1], lambda _item: cancelled.wait(30), cancel=cancelled.set)
    with within(1.0):
        results.close()
    assert not results._thread.is_alive()


def test_closing_does_not_wait_for_an_iterable_that_hangs(until):
    released = threading.Event()
    results = prefetch(released.wait(30) for _ in range(1))
    with within(2.0):
        results.close()
    released.set()
    until(lambda: not results._thread.is_alive())


def test_what_was_closed_says_so_instead_of_ending_quietly():
    results = prefetch([1, 2, 3])
    results.close()
    with pytest.raises(RuntimeError, match="was closed, or ended by a later one"):
        next(results)


def test_closing_from_another_thread_wakes_the_consumer(until):
    released = threading.Event()
    waiting = threading.Event()
    results = prefetch((released.wait(30) for _ in range(1)), waiting=waiting, cancel=released.set)
    errors = []

    def take():
        try:
            next(results)
        except RuntimeError as error:
            errors.append(error)

    taker = threading.Thread(target=take)
    taker.start()
    until(waiting.is_set)
    results.close()
    taker.join(20)  # less than the work takes unless it is cancelled
    assert errors


def test_work_can_see_whether_the_consumer_waits(until):
    waiting, seen = threading.Event(), []

    def work(item):
        until(lambda: waiting.is_set() or item != 0)
        seen.append(waiting.is_set())
        return item

    results = prefetch(range(3), work, waiting=waiting)
    assert next(results) == 0
    until(lambda: len(seen) == 3)
    assert seen == [True, False, False]
    results.close()


def test_a_consumer_that_was_sent_away_does_not_wait_any_more(until):
    waiting, released = threading.Event(), threading.Event()
    results = prefetch([1], lambda _item: released.wait(30), waiting=waiting, cancel=released.set)
    closer = threading.Thread(target=lambda: (until(waiting.is_set), results.close()))
    closer.start()
    with pytest.raises(RuntimeError, match="was closed"):
        next(results)
    closer.join(20)
    assert not waiting.is_set()
