"""One root for each super-batch and rank, which always ends and says how."""

from __future__ import annotations

import subprocess
import sys
import threading

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from scripted_server import fail
from trainer_samples import POLICY, embeddings, super_batch

import jest_trainer as jest
from jest_proto.v1 import jobs_pb2
from jest_trainer._rpc.channel import CallSite
from jest_trainer._rpc.deadlines import Deadline
from jest_wire import tracing

WHOLE_LIFE = [
    "sdk.SubmitSuperBatch",
    "sdk.features",
    "sdk.UploadExamples",
    "sdk.wait_turn",
    "sdk.embed",
    "sdk.SelectSubBatch",
]


@pytest.fixture
def client(server, collector):
    with jest.Client(server.address, deadline_s=5.0) as client:
        yield client


def super_batches(count):
    return (super_batch(step) for step in range(count))


def outcomes(collector):
    roots = sorted(collector.named("sdk.super_batch"), key=lambda s: s.attributes["jest.super_batch"])
    assert all(s.parent_id == "" for s in roots)
    return [s.attributes["jest.outcome"] for s in roots]


def test_the_calls_and_the_learner_s_time_are_parts_of_one_root(make_loop, collector):
    list(make_loop(super_batches(2)))
    tracing.stop()
    assert outcomes(collector) == ["selected", "selected"]
    for root in collector.named("sdk.super_batch"):
        parts = [s for s in collector.spans() if s.parent_id == root.span_id]
        assert collector.children(root) == WHOLE_LIFE
        assert {s.trace_id for s in parts} == {root.trace_id}
        assert all(root.start_s <= s.start_s <= s.end_s <= root.end_s for s in parts)
        about = {"jest.job": "run-1", "jest.super_batch": root.attributes["jest.super_batch"], "jest.rank": 0}
        assert all(about.items() <= s.attributes.items() for s in (root, *parts))
        assert (root.status, root.service) == ("unset", "jest-trainer")


def test_the_wait_for_its_turn_is_what_the_step_before_took(make_loop, collector):
    trained = threading.Event()
    for _ in make_loop(super_batches(2), prefetch=1):
        trained.wait(0.4)
    tracing.stop()
    (waited,) = collector.named("sdk.wait_turn", super_batch="00000001")
    assert 0.2 < waited.end_s - waited.start_s < 5


def test_what_was_submitted_ahead_for_nothing_is_abandoned(server, make_loop, collector, until):
    loop = make_loop(super_batches(9), prefetch=2)
    for _ in loop:
        until(lambda: server.count("UploadExamples") == 3)
        break
    loop.close()
    tracing.stop()
    assert outcomes(collector) == ["selected", "abandoned", "abandoned"]


def test_what_was_just_being_submitted_is_abandoned_too(server, make_loop, collector, until):
    server.script["SubmitSuperBatch"].extend([fail(grpc.StatusCode.UNAVAILABLE)] * 100)
    loop = make_loop(super_batches(1))

    def take():
        with pytest.raises(RuntimeError, match="was closed"):
            next(iter(loop))

    taker = threading.Thread(target=take)
    taker.start()
    until(lambda: server.count("SubmitSuperBatch") > 1)
    loop.close()
    taker.join()
    tracing.stop()
    assert outcomes(collector) == ["abandoned"]


def test_an_error_of_the_learner_is_in_the_trace(make_loop, collector):
    def embed(_batch):
        raise ZeroDivisionError("no scale")

    with pytest.raises(ZeroDivisionError):
        list(make_loop(super_batches(1), embed=embed))
    tracing.stop()
    (root,) = collector.named("sdk.super_batch")
    assert (root.attributes["jest.outcome"], root.status) == ("failed", "error")
    assert root.message == "ZeroDivisionError: no scale"


def test_the_trainer_s_own_spans_stay_what_they_are(make_loop, collector):
    """A trainer may trace for itself, with a provider of its own."""
    own = TracerProvider().get_tracer("trainer")
    active = []

    def embed(batch):
        active.append(trace.get_current_span())
        return embeddings(batch)

    with own.start_as_current_span("train_step") as step:
        active.extend(trace.get_current_span() for _ in make_loop(super_batches(2), embed=embed))
    assert active == [step] * 4
    tracing.stop()
    assert step.get_span_context().trace_id not in {int(s.trace_id, 16) for s in collector.spans()}


def test_a_refusal_is_in_the_trace(server, make_loop, collector):
    server.script["SubmitSuperBatch"].append(fail(grpc.StatusCode.INVALID_ARGUMENT, "INVALID", "bad keys"))
    with pytest.raises(jest.JestError):
        list(make_loop(super_batches(1)))
    tracing.stop()
    (root,) = collector.named("sdk.super_batch")
    assert (root.attributes["jest.outcome"], root.status) == ("failed", "error")
    assert "bad keys" in root.message


@pytest.mark.parametrize("known_early", [True, False])
def test_a_super_batch_that_is_set_aside_says_why(server, make_loop, collector, known_early):
    server.script["SubmitSuperBatch" if known_early else "SelectSubBatch"].append(
        fail(grpc.StatusCode.ABORTED, "DEAD_LETTERED", "dead-lettered: MODEL_ERROR")
    )
    list(make_loop(super_batches(2)))
    tracing.stop()
    assert outcomes(collector) == ["dead_lettered", "selected"]
    (root,) = collector.named("sdk.super_batch", outcome="dead_lettered")
    assert (root.status, "dead-lettered: MODEL_ERROR" in root.message) == ("error", True)


def test_a_fallback_is_told_with_its_reason(server, make_loop, collector):
    server.answers = {"fallback": jobs_pb2.FALLBACK_UNIFORM, "fallback_reason": "late by 3 s"}
    list(make_loop(super_batches(1)))
    tracing.stop()
    (root,) = collector.named("sdk.super_batch")
    assert root.attributes["jest.outcome"] == "selected"
    assert (root.attributes["jest.fallback"], root.attributes["jest.fallback_reason"]) == ("uniform", "late by 3 s")


def test_a_call_that_was_repeated_is_one_span_and_counts_its_attempts(server, make_loop, collector):
    server.script["SelectSubBatch"].extend([fail(grpc.StatusCode.UNAVAILABLE)] * 2)
    list(make_loop(super_batches(1)))
    tracing.stop()
    (call,) = collector.named("sdk.SelectSubBatch")
    assert (call.attributes["jest.attempts"], call.status) == (3, "unset")
    sent = [seen.metadata["traceparent"] for seen in server.seen if seen.method == "SelectSubBatch"]
    assert sent == [f"00-{call.trace_id}-{call.span_id}-01"] * 3


def test_what_is_submitted_again_stays_under_its_root(server, make_loop, collector):
    server.script["SelectSubBatch"].append(fail(grpc.StatusCode.FAILED_PRECONDITION, "REFERENCE_MISSING"))
    list(make_loop(super_batches(1)))
    tracing.stop()
    (root,) = collector.named("sdk.super_batch")
    assert collector.children(root) == [*WHOLE_LIFE, "sdk.SubmitSuperBatch", "sdk.SelectSubBatch"]


def test_raw_calls_stand_side_by_side(job, collector):
    job.submit("mine", ["a", "b", "c", "d"], step=0)
    job.submit("mine", ["a", "b", "c", "d"], step=0)
    tracing.stop()
    first, again = collector.named("sdk.SubmitSuperBatch")
    assert first.trace_id == again.trace_id
    assert {first.parent_id, again.parent_id} == {""}


def test_a_trainer_that_ends_in_the_middle_of_its_loop_says_so(server, collector):
    code = (
        "import sys\nsys.path[:0] = sys.argv[2:]\n"
        "import jest_trainer as jest\nfrom trainer_samples import POLICY, embeddings, super_batch\n"
        "client = jest.Client(sys.argv[1], deadline_s=5.0)\n"
        "job = client.create_job('run-1', reference_model='reference', policy=POLICY)\n"
        "loop = iter(jest.SelectedBatches(job, [super_batch(0), super_batch(1)], embed=embeddings, prefetch=1,\n"
        "    keys=lambda b: b['keys'], features=lambda b: {'image': b['image'], 'tokens': b['tokens']}))\n"
        "next(loop)\n"
        "keep = loop.__next__\n"
        "sys.modules['keep'] = keep\n"  # not collected before the end
    )
    subprocess.run([sys.executable, "-c", code, server.address, *sys.path], check=True)
    assert outcomes(collector)[0] == "selected"
    assert set(outcomes(collector)[1:]) <= {"abandoned"}


class Untouched(str):
    """A name of which nobody may make another."""

    __slots__ = ()

    def __format__(self, _spec):
        raise AssertionError("a name was put together while tracing is off")


def test_a_call_puts_no_names_together_while_tracing_is_off(server):
    with jest.Client(server.address) as client:
        client.create_job("run-1", reference_model="reference", policy=POLICY)
        answer = client._connection.call(
            lambda stubs: stubs.jobs.GetJob,
            lambda: jobs_pb2.GetJobRequest(name="run-1"),
            CallSite(Untouched("GetJob"), Untouched("run-1"), Untouched("7"), 0),
            Deadline(5.0),
        )
    assert answer.job.spec.name == "run-1"
    assert not tracing.on()
