from __future__ import annotations

import gc
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from scripted_server import fail, hold, proceed
from trainer_samples import EXPECTED_ROWS, POLICY, embeddings, super_batch

import jest_trainer as jest
from support.polling import within

Code = grpc.StatusCode
MISSING = fail(Code.FAILED_PRECONDITION, "REFERENCE_MISSING", "evicted since submission")
DEAD = fail(Code.ABORTED, "DEAD_LETTERED", "dead-lettered: MODEL_ERROR")


def endless():
    return map(super_batch, itertools.count())


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("jest-")]


# The server's memory


def test_rows_that_were_evicted_are_submitted_and_uploaded_again_without_another_forward_pass(server, make_loop):
    embedded = []

    def embed(batch):
        embedded.append(batch["step"])
        server.evict()  # after submission, before selection
        return embeddings(batch)

    (batch,) = make_loop([super_batch(0)], embed=embed)
    assert batch["row"].tolist() == EXPECTED_ROWS
    assert embedded == [0]
    assert [call.method for call in server.seen[1:]] == [
        "SubmitSuperBatch",
        "UploadExamples",
        "SelectSubBatch",
        "SubmitSuperBatch",
        "UploadExamples",
        "SelectSubBatch",
    ]
    first, second = server.requests("SelectSubBatch")
    assert first == second


def test_a_super_batch_that_the_server_forgot_is_submitted_again(server, make_loop):
    def embed(batch):
        server.submissions.clear()
        return embeddings(batch)

    assert len(list(make_loop([super_batch(0)], embed=embed))) == 1


def test_submitting_again_has_an_end(server, make_loop):
    server.script["SelectSubBatch"].extend([MISSING] * 100)
    with pytest.raises(jest.JestError, match="REFERENCE_MISSING"):
        list(make_loop([super_batch(0)]))
    assert server.count("SelectSubBatch") == 4


# Dead letters


def test_a_dead_letter_is_logged_counted_and_left_behind(server, make_loop, caplog):
    server.script["SelectSubBatch"].extend([proceed, DEAD])
    loop = make_loop([super_batch(step) for step in range(3)])
    assert [batch["step"] for batch in loop] == [0, 2]
    assert (loop.stats.dead_lettered, loop.stats.super_batches, loop.stats.examples_loaded) == (1, 2, 24)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("continuing without a super-batch: SelectSubBatch of super-batch '00000001'")
    assert "MODEL_ERROR" in warning


def test_a_super_batch_that_died_before_it_was_submitted_costs_no_forward_pass(server, make_loop):
    server.dead = {"00000001"}
    embedded = []
    loop = make_loop(
        [super_batch(step) for step in range(3)], embed=lambda b: embedded.append(b["step"]) or embeddings(b)
    )
    assert [batch["step"] for batch in loop] == [0, 2]
    assert embedded == [0, 2]
    assert loop.stats.dead_lettered == 1


def test_a_step_without_a_decision_is_not_repeated_after_a_resume(server, make_loop):
    server.dead = {"00000001"}
    loop = make_loop([super_batch(step) for step in range(2)])
    list(loop)
    assert loop.state_dict() == {"next_step": 2}


def test_dead_letters_without_end_are_an_error(server, make_loop):
    server.script["SelectSubBatch"].extend([DEAD] * 100)
    loop = make_loop(endless(), prefetch=2)
    with pytest.raises(jest.JestError, match="DEAD_LETTERED") as caught:
        next(iter(loop))
    assert loop.stats.dead_lettered == 11
    assert "11 super-batches in a row" in caught.value.__notes__[0]


def test_a_decision_in_between_starts_the_count_of_dead_letters_again(server, make_loop):
    server.script["SelectSubBatch"].extend(([DEAD] * 9 + [proceed]) * 3)
    loop = make_loop([super_batch(step) for step in range(30)])
    assert [batch["step"] for batch in loop] == [9, 19, 29]


# Errors of the user's code


def test_an_error_of_the_iterable_surfaces_after_the_batches_before_it(make_loop):
    def broken():
        yield super_batch(0)
        yield super_batch(1)
        raise OSError("disk on fire")

    loop = iter(make_loop(broken()))
    assert [next(loop)["step"], next(loop)["step"]] == [0, 1]
    with pytest.raises(OSError, match="disk on fire"):
        next(loop)


@pytest.mark.parametrize("name", ["keys", "features", "embed", "take"])
def test_an_error_of_a_callback_surfaces_as_it_is(make_loop, name):
    def broken(*_arguments):
        raise LookupError(name)

    with pytest.raises(LookupError, match=name):
        list(make_loop([super_batch(0)], **{name: broken}))


def test_an_iterable_that_cannot_be_iterated_fails_in_the_loop(make_loop):
    with pytest.raises(TypeError, match="not iterable"):
        list(make_loop(5))


# Errors of the server


def test_a_final_error_of_a_prefetched_super_batch_waits_for_its_turn(server, make_loop):
    refusal = fail(Code.INVALID_ARGUMENT, "INVALID_FIELD", "bad key")
    server.script["SubmitSuperBatch"].extend([proceed, refusal])
    loop = iter(make_loop([super_batch(step) for step in range(3)]))
    assert next(loop)["step"] == 0
    with pytest.raises(jest.JestError, match="bad key"):
        next(loop)


def test_someone_who_waits_waits_no_longer_than_the_deadline(server, make_loop):
    server.script["SubmitSuperBatch"].extend([fail(Code.UNAVAILABLE)] * 100)
    with jest.Client(server.address, deadline_s=0.6) as client:
        job = client.create_job("hasty", reference_model="r", policy=POLICY)
        with within(1.6), pytest.raises(jest.JestError, match="UNAVAILABLE"):
            list(make_loop([super_batch(0)], job=job))


@pytest.mark.parametrize(
    "trouble", [fail(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after_s=0.02), fail(Code.UNAVAILABLE)]
)
def test_trouble_that_passes_while_nobody_waits_is_not_noticed(server, make_loop, until, trouble):
    with jest.Client(server.address, deadline_s=0.3) as client:
        job = client.create_job("hasty", reference_model="r", policy=POLICY)
        loop = iter(make_loop([super_batch(step) for step in range(3)], job=job, prefetch=2))
        server.script["SubmitSuperBatch"].extend([proceed] * 2 + [trouble] * 10_000)
        assert next(loop)["step"] == 0
        started = time.monotonic()
        until(lambda: time.monotonic() - started > 0.8)  # an evaluation longer than the deadline
        server.script["SubmitSuperBatch"].clear()
        until(lambda: server.count("UploadExamples") == 3)
        assert [batch["step"] for batch in loop] == [1, 2]


def test_a_stopped_server_ends_the_loop_within_the_deadline(process_server, make_loop):
    process, address = process_server
    with jest.Client(address, deadline_s=1.0) as client:
        job = client.create_job("run", reference_model="r", policy=POLICY)
        loop = iter(make_loop(endless(), job=job))
        next(loop)
        os.kill(process.pid, signal.SIGSTOP)
        with within(2.0), pytest.raises(jest.JestError) as caught:
            next(loop)
        assert caught.value.code is Code.DEADLINE_EXCEEDED
        loop.close()
        os.kill(process.pid, signal.SIGCONT)


# Leaving


def test_breaking_out_stops_the_thread_at_once(make_loop):
    for _ in make_loop(endless()):
        assert threads()
        break
    assert not threads()


def test_breaking_out_does_not_wait_for_a_server_that_hangs(server, make_loop, until):
    never = threading.Event()
    server.script["SubmitSuperBatch"].extend([proceed, hold(never)])
    loop = iter(make_loop(endless()))
    next(loop)
    until(lambda: server.count("SubmitSuperBatch") == 2)
    with within(1.0):
        del loop  # as leaving a `for` does
    assert not threads()


def test_an_error_in_the_loop_s_body_stops_the_thread(make_loop, until):
    def train():
        for _ in make_loop(endless()):
            raise ArithmeticError("loss is NaN")

    with pytest.raises(ArithmeticError):
        train()
    gc.collect()
    until(lambda: not threads())


def test_an_interrupt_while_waiting_surfaces_and_stops_the_thread(make_loop, until):
    released = threading.Event()

    def stuck():
        yield super_batch(0)
        released.wait(30)

    main = threading.get_ident()
    loop = iter(make_loop(stuck()))
    next(loop)
    threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with within(3.0), pytest.raises(KeyboardInterrupt):
        next(loop)
    released.set()
    until(lambda: not threads())


def test_a_loop_that_was_never_entered_has_no_thread(server, make_loop):
    iter(make_loop(endless()))
    assert not threads()
    assert server.count("SubmitSuperBatch") == 0


def test_close_stops_a_loop_that_is_still_held(make_loop):
    loop = make_loop(endless())
    held = iter(loop)
    next(held)
    loop.close()
    assert not threads()
    with pytest.raises(RuntimeError, match="was closed"):
        next(held)


def test_a_with_block_closes_the_loop(make_loop):
    with make_loop(endless()) as loop:
        held = iter(loop)
        next(held)
    assert not threads()
    held.close()


def test_a_second_pass_ends_the_first(make_loop):
    loop = make_loop([super_batch(step) for step in range(9)])
    first = iter(loop)
    next(first)
    second = iter(loop)
    next(second)
    with pytest.raises(RuntimeError, match="ended by a later one"):
        next(first)
    assert next(second)["step"] == 1
    second.close()


def test_many_steps_leave_nothing_behind(server, make_loop, until):
    server.cached = {f"0-{row}" for row in range(8)}
    before = threading.active_count()
    loop = make_loop([super_batch(0)] * 100)
    assert sum(1 for _ in loop) == 100
    until(lambda: threading.active_count() <= before + 16)  # the server's own pool


def test_an_interpreter_that_ends_within_a_loop_ends_quietly(process_server):
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import itertools, jest_trainer as jest\n"
        "from trainer_samples import POLICY, embeddings, super_batch\n"
        f"client = jest.Client({process_server[1]!r}, deadline_s=20)\n"
        "job = client.create_job('run', reference_model='r', policy=POLICY)\n"
        "loop = iter(jest.SelectedBatches(job, map(super_batch, itertools.count()), keys=lambda b: b['keys'],\n"
        "    features=lambda b: {'image': b['image'], 'tokens': b['tokens']}, embed=embeddings))\n"
        "print(next(loop)['step'])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "0", "")
