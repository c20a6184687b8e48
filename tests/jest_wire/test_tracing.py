"""What costs nothing while it is off, and ends in time while it is on."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest

from jest_wire import tracing
from support.collector import no_collector
from support.polling import within

OWN_PATIENCE_S = 60
"""How long the exporter would wait if it were asked."""


class Untouched(str):
    """A name that nobody may make anything of."""

    __slots__ = ()

    def _refuse(self, *_):
        raise AssertionError("something was made of a name while tracing is off")

    __format__ = __str__ = __hash__ = __add__ = __radd__ = encode = _refuse


def all_that_is_asked_for_a_super_batch(name):
    held = tracing.super_batch_span("sdk.super_batch", name, name, 0)
    with held.ending("selected"):
        with tracing.call_span(name, name, name, 0, held):
            tracing.about(name, name, 0)
            tracing.traceparent()
        with held.child("sdk.embed"):
            held.waited("sdk.wait_turn")
        with tracing.span("scorer.queue", job=name, super_batch_id=name, parent=name, since_s=1.5):
            tracing.ids()
    held.chosen_by_fallback(name, name)
    held.end("failed")


def test_while_it_is_off_nothing_is_made_of_what_a_span_would_be_about():
    assert not tracing.on()
    all_that_is_asked_for_a_super_batch(Untouched("a name"))


def test_a_trace_is_named_by_job_and_super_batch(collector):
    tracing.start("test")
    for rank in (0, 1):
        tracing.super_batch_span("sdk.super_batch", "job", "7", rank).end("selected")
    tracing.super_batch_span("sdk.super_batch", "job", "8", 0).end("selected")
    tracing.stop()
    first, second, other = sorted(collector.spans(), key=lambda s: s.start_s)
    assert first.trace_id == second.trace_id != other.trace_id
    assert (first.attributes["jest.rank"], second.attributes["jest.rank"]) == (0, 1)


def test_ranks_with_the_same_seed_have_spans_of_their_own(collector):
    tracing.start("test")
    for rank in (0, 1):
        random.seed(0)
        tracing.super_batch_span("sdk.super_batch", "job", "7", rank).end("selected")
    drawn = random.random()
    tracing.stop()
    assert len({s.span_id for s in collector.spans()}) == 2
    random.seed(0)
    assert random.random() == drawn, "tracing takes nothing from the trainer's own random numbers"


def test_a_span_that_began_elsewhere_may_have_begun_by_another_clock(collector):
    tracing.start("test")
    now_s = time.time()
    for name, since_s in (("past", now_s - 5), ("future", now_s + 60)):
        with tracing.span(name, since_s=since_s):
            pass
    tracing.stop()
    (past,), (future,) = collector.named("past"), collector.named("future")
    assert past.start_s == pytest.approx(now_s - 5, abs=0.001)
    assert now_s <= future.start_s <= future.end_s < now_s + 30


def test_what_is_held_when_tracing_stops_is_ended_and_says_so(collector):
    tracing.start("test")
    held = tracing.super_batch_span("sdk.super_batch", "job", "7", 0)
    tracing.stop()
    held.end("selected")  # too late
    (span,) = collector.spans()
    assert span.attributes["jest.outcome"] == "abandoned"


@pytest.mark.parametrize("kind", ["absent", "silent", "stuck"])
def test_stopping_waits_for_no_collector_longer_than_it_may(kind, traced, caplog, monkeypatch):
    monkeypatch.setattr(tracing, "STOP_S", 0.5)
    with no_collector(kind) as port:
        traced(port, timeout_s=OWN_PATIENCE_S)
        tracing.start("test")
        for _ in range(2000):  # several batches
            with tracing.span("unheard"):
                pass
        with within(tracing.STOP_S + 2):
            tracing.stop()
    assert f"did not take the rest within {tracing.STOP_S:g} s" in caplog.text


def test_a_process_that_ends_without_a_word_waits_no_longer_either(traced):
    code = (
        "import time\nfrom jest_wire import tracing\n"
        "tracing.start('test')\n"
        "with tracing.span('unheard'): pass\n"
        "held = tracing.super_batch_span('sdk.super_batch', 'job', '7', 0)\n"
        "time.sleep(0.5)\n"  # the first export is under way
        "print('ends', flush=True)"
    )
    with no_collector("silent") as port:
        traced(port, timeout_s=OWN_PATIENCE_S)
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline() == "ends\n"
            with within(tracing.STOP_S + 3):
                _, said = process.communicate()
    assert process.returncode == 0
    assert "Fatal" not in said
    assert "Traceback" not in said


def test_a_process_that_ends_without_a_word_sends_what_it_has(collector):
    code = (
        "from jest_wire import tracing\n"
        "tracing.start('test')\n"
        "span = tracing.super_batch_span('sdk.super_batch', 'job', '7', 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    (span,) = collector.spans()
    assert (span.service, span.attributes["jest.outcome"]) == ("test", "abandoned")


def test_a_forked_child_ends_nothing_of_its_parents_and_may_trace_on_its_own(collector):
    code = (
        "import os\nfrom jest_wire import tracing\n"
        "tracing.start('parent')\n"
        "tracing.super_batch_span('of the parent', 'job', '7', 0)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    tracing.start('child')\n"
        "    with tracing.span('of the child'): pass\n"
        "else:\n"
        "    os.waitpid(child, 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert sorted((s.service, s.name) for s in collector.spans()) == [
        ("child", "of the child"),
        ("parent", "of the parent"),
    ]
