"""What a trace shows of trouble, and what trouble with traces may not do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

import grpc
import pytest

import jest_trainer
from jest_bench.scoring_stack import ScoringStack
from jest_core import SelectionPolicy
from jest_server.local.process import free_port
from jest_server.local.stack import Stack
from jest_server.local.triton_server import TritonServer
from jest_wire import tracing
from support.collector import no_collector
from support.learner import TinyLearner, selected, super_batches
from support.polling import within

POLICY = SelectionPolicy(filter_ratio=0.75, num_chunks=4)
TESTS = Path(__file__).parents[1]
EXPORTER_S = 60
"""How long an exporter would wait for its collector if it were let."""
needs_triton = pytest.mark.skipif(TritonServer.available() is not None, reason=str(TritonServer.available()))


def select_one(address, name, *, embed=None):
    with jest_trainer.Client(address, deadline_s=60) as client:
        job = client.create_job(name, reference_model="jest_reference", policy=POLICY)
        learner = TinyLearner(seed=0)
        if embed is not None:
            learner.embed = embed
        return len(list(selected(job, learner, super_batches(count=1, rows=64, seed=int(time.time() * 1000)))))


class Passing(grpc.GenericRpcHandler):
    """Passes unary calls on to another gRPC server, and keeps what they carry beside their messages."""

    def __init__(self, to):
        self.port = free_port()
        self.metadata = []
        self._to = to
        self._server = grpc.server(futures.ThreadPoolExecutor(8), handlers=[self])

    def service(self, call):
        def pass_on(request, context):
            self.metadata.append((call.method, dict(context.invocation_metadata())))
            try:
                with grpc.insecure_channel(self._to()) as channel:
                    return channel.unary_unary(call.method)(request, timeout=context.time_remaining())
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())

        return grpc.unary_unary_rpc_method_handler(pass_on)

    def __enter__(self):
        self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()
        return self

    def __exit__(self, *_):
        self._server.stop(0).wait()


@needs_triton
def test_requests_to_triton_carry_the_span_that_makes_them(stack_repository, collector, unique):
    between = Passing(lambda: stack.triton.grpc_url)
    stack = ScoringStack(stack_repository, scorers=1, settings={"triton_url": f"127.0.0.1:{between.port}"})
    with between, stack:
        assert select_one(stack.address, unique("wire")) == 1
        tracing.stop()
        stack.scorers[0].stop()
    (infer,) = collector.named("scorer.infer")
    sent = [metadata.get("traceparent") for method, metadata in between.metadata if method.endswith("/ModelInfer")]
    assert set(sent) == {None, f"00-{infer.trace_id}-{infer.span_id}-01"}  # None: the probes of whether it works
    (root,) = collector.named("sdk.super_batch")
    assert infer.trace_id == root.trace_id


@needs_triton
def test_a_shard_that_another_scorer_takes_over_shows_in_the_same_trace(stack_repository, collector, unique):
    settings = {"reclaim_idle_s": 1, "announce_interval_s": 0.5}
    with (
        ScoringStack(stack_repository, scorers=2, settings=settings) as stack,
        futures.ThreadPoolExecutor(1) as trainer,
    ):
        os.kill(stack.triton.pid, signal.SIGSTOP)
        try:
            trained = trainer.submit(select_one, stack.address, unique("reclaimed"))
            first = collector.wait_for("scorer.queue", deliveries=1)
            dies = int(first.attributes["jest.consumer"].removeprefix("scorer-"))
            stack.scorers[dies].kill()
        finally:
            os.kill(stack.triton.pid, signal.SIGCONT)
        assert trained.result() == 1
        tracing.stop()
        second = collector.wait_for("scorer.queue", deliveries=2)
        shard = collector.wait_for("scorer.shard", deliveries=2)
    assert second.attributes["jest.consumer"] == shard.attributes["jest.consumer"] == f"scorer-{1 - dies}"
    assert second.start_s == pytest.approx(first.start_s, abs=0.001)
    assert second.end_s > first.end_s
    (root,) = collector.named("sdk.super_batch")
    assert {first.trace_id, second.trace_id, shard.trace_id} == {root.trace_id}
    assert root.attributes["jest.outcome"] == "selected"


def test_a_call_that_a_dead_selector_left_unanswered_goes_on_in_the_same_span(stack_repository, collector, unique):
    learner = TinyLearner(seed=0)
    with Stack(stack_repository) as stack:

        def embed(batch):
            stack.kill("selector")  # the next call finds nobody
            return learner.embed(batch)

        assert select_one(stack.address, unique("retried"), embed=embed) == 1
        tracing.stop()
    (call,) = collector.named("sdk.SelectSubBatch")
    assert call.attributes["jest.attempts"] > 1
    assert "jest.v1.SelectionService/SelectSubBatch" in collector.children(call)
    (root,) = collector.named("sdk.super_batch")
    assert (call.parent_id, root.attributes["jest.outcome"]) == (root.span_id, "selected")


@needs_triton
def test_processes_end_in_time_without_a_collector_that_answers(stack_repository, traced, unique):
    """With nothing in hand, what is left of the time to stop is what tracing takes."""
    trainer = (
        "import sys, time\nsys.path.insert(0, sys.argv[3])\n"
        "from end_to_end.test_tracing_trouble import select_one\n"
        "assert select_one(sys.argv[1], sys.argv[2]) == 1\n"
        "print('ends', flush=True)"
    )
    with no_collector("silent") as port:
        traced(port, timeout_s=EXPORTER_S)
        with ScoringStack(stack_repository, scorers=1) as stack:
            command = [sys.executable, "-c", trainer, stack.address, unique("unheard"), str(TESTS)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                assert process.stdout.readline() == "ends\n"
                with within(tracing.STOP_S + 4):
                    _, trainer_said = process.communicate()
            assert process.returncode == 0, trainer_said
            for part in (stack.scorers[0], stack.selector):
                with within(tracing.STOP_S + 4):
                    part.stop()
            logs = [(stack.folder / f"{name}.log").read_text() for name in ("scorer-0", "selector")]
    for said in (trainer_said, *logs):
        assert said.count("did not take the rest") <= 1
        assert "Traceback" not in said
