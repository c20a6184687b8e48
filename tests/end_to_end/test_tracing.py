"""One super-batch, one trace: the whole stack with a real OTLP receiver."""

from __future__ import annotations

import subprocess
import sys
from concurrent import futures

import grpc
import pytest

import jest_trainer
from jest_core import SelectionPolicy
from jest_proto.v1 import selection_pb2, selection_pb2_grpc
from jest_server.domain.shards import Shard
from jest_server.local.stack import Stack
from jest_server.local.triton_server import TritonServer
from jest_server.runtime.logs import _with_trace
from jest_server.stores.redis.shard_codec import pack_shard, unpack_shard
from jest_wire import tracing
from support.learner import TinyLearner, selected, super_batches

POLICY = SelectionPolicy(filter_ratio=0.75, num_chunks=4)


def select_one(address, name):
    with jest_trainer.Client(address, deadline_s=30) as client:
        job = client.create_job(name, reference_model="jest_reference", policy=POLICY)
        batches = selected(job, TinyLearner(seed=0), super_batches(count=1, rows=64, seed=31))
        ((_, decision),) = batches.with_decisions()
        counters = job.counters()
        return decision.super_batch_id, (counters.submitted, counters.selected, counters.in_flight)


def test_one_trace_leads_from_the_trainer_to_the_reference_model_and_back(stack_repository, collector, unique):
    name = unique("traced")
    with Stack(stack_repository) as stack:
        super_batch, _ = select_one(stack.address, name)
        tracing.stop()
    # The processes have ended: whatever they had is here.
    (root,) = collector.named("sdk.super_batch", job=name)
    trace = [s for s in collector.spans() if s.trace_id == root.trace_id]
    by_id = {s.span_id: s for s in trace}
    lineage = {(s.name, by_id[s.parent_id].name if s.parent_id else "", s.service) for s in trace}
    service = "jest.v1.SelectionService"
    assert lineage >= {
        ("sdk.super_batch", "", "jest-trainer"),
        ("sdk.SubmitSuperBatch", "sdk.super_batch", "jest-trainer"),
        ("sdk.features", "sdk.super_batch", "jest-trainer"),
        ("sdk.UploadExamples", "sdk.super_batch", "jest-trainer"),
        ("sdk.wait_turn", "sdk.super_batch", "jest-trainer"),
        ("sdk.embed", "sdk.super_batch", "jest-trainer"),
        ("sdk.SelectSubBatch", "sdk.super_batch", "jest-trainer"),
        (f"{service}/SubmitSuperBatch", "sdk.SubmitSuperBatch", "jest-selector"),
        (f"{service}/UploadExamples", "sdk.UploadExamples", "jest-selector"),
        (f"{service}/SelectSubBatch", "sdk.SelectSubBatch", "jest-selector"),
        ("selector.wait_learner", f"{service}/SelectSubBatch", "jest-selector"),
        ("selector.wait_reference", f"{service}/SelectSubBatch", "jest-selector"),
        ("selector.compute", f"{service}/SelectSubBatch", "jest-selector"),
        ("selector.record", f"{service}/SelectSubBatch", "jest-selector"),
        ("scorer.queue", f"{service}/UploadExamples", "jest-scorer"),
        ("scorer.shard", f"{service}/UploadExamples", "jest-scorer"),
        ("scorer.cache", "scorer.shard", "jest-scorer"),
        ("scorer.infer", "scorer.shard", "jest-scorer"),
        ("scorer.complete", "scorer.shard", "jest-scorer"),
    }
    assert [s.name for s in trace if not s.parent_id] == ["sdk.super_batch"]
    (shard,) = collector.named("scorer.shard", job=name)
    assert shard.attributes["jest.super_batch"] == super_batch
    assert (shard.attributes["jest.examples"], shard.attributes["jest.inferred"]) == (64, 64)
    (queue,) = collector.named("scorer.queue", job=name)
    (upload,) = collector.named("sdk.UploadExamples", job=name)
    assert upload.start_s - 0.01 < queue.start_s <= queue.end_s <= shard.start_s
    about = {"jest.job": name, "jest.super_batch": super_batch}
    of_ranks = [s for s in trace if s.name.startswith(("sdk.", service))]
    of_all = [s for s in trace if s.name.startswith("selector.")]
    assert (len(of_ranks), len(of_all)) == (10, 4)
    assert all((about | {"jest.rank": 0}).items() <= s.attributes.items() for s in of_ranks)
    assert all(about.items() <= s.attributes.items() for s in of_all)


def test_ranks_meet_in_one_trace_with_a_root_each(stack_repository, collector, unique):
    name, world_size = unique("ranks"), 3
    with Stack(stack_repository) as stack:

        def train(rank):
            with jest_trainer.Client(stack.address, deadline_s=30) as client:
                job = client.create_job(name, reference_model="jest_reference", policy=POLICY, world_size=world_size)
                return len(
                    list(selected(job, TinyLearner(seed=0), super_batches(count=2, rows=64, seed=40 + rank), rank=rank))
                )

        with futures.ThreadPoolExecutor(world_size) as ranks:
            assert list(ranks.map(train, range(world_size))) == [2] * world_size
        tracing.stop()
    for step in range(2):
        roots = collector.named("sdk.super_batch", job=name, super_batch=f"{step:08d}")
        assert sorted(s.attributes["jest.rank"] for s in roots) == list(range(world_size))
        (trace_id,) = {s.trace_id for s in roots}
        trace = [s for s in collector.spans() if s.trace_id == trace_id]
        assert {s.span_id for s in trace if not s.parent_id} == {s.span_id for s in roots}
        assert len({s.span_id for s in trace}) == len(trace)
        assert sum(s.name == "selector.compute" for s in trace) == 1
        assert {s.parent_id for s in trace} <= {s.span_id for s in trace} | {""}


def test_a_stack_without_triton_records_the_same(stack_repository, collector, unique, monkeypatch):
    monkeypatch.setattr(TritonServer, "available", staticmethod(lambda: "there is none"))
    with Stack(stack_repository) as stack:
        select_one(stack.address, unique("embedded"))
        tracing.stop()
    (root,) = collector.named("sdk.super_batch")
    trace = {(s.service, s.name) for s in collector.spans() if s.trace_id == root.trace_id}
    assert trace >= {
        ("jest-trainer", "sdk.embed"),
        ("jest-selector", "selector.compute"),
        ("jest-scorer", "scorer.queue"),
        ("jest-scorer", "scorer.infer"),
    }


def test_a_collector_that_is_away_costs_no_selection(stack_repository, traced, unique):
    traced(1)
    with Stack(stack_repository) as stack:
        _, accounts = select_one(stack.address, unique("no-collector"))
    assert accounts == (1, 1, 0)


@pytest.mark.parametrize("module", ["jest_server.selector.__main__", "jest_server.scorer.__main__", "jest_trainer"])
def test_without_tracing_nothing_of_ours_imports_opentelemetry(module):
    """The client of Redis looks for it by itself, and goes on without; here whoever looks finds none."""
    code = (
        "import sys\nsys.modules['opentelemetry'] = None\n"
        f"import {module}\nfrom jest_wire import tracing\n"
        "with tracing.span('x') as span: assert span is None\n"
        "assert tracing.span('x') is tracing.span('y') and tracing.traceparent() == ''\n"
        "sys.exit('jest_wire._otel' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_trainer_does_not_import_opentelemetry_without_tracing():
    code = (
        "import sys, jest_trainer\njest_trainer.Client('127.0.0.1:1').close()\nsys.exit('opentelemetry' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("tracing_is_on", [False, True])
def test_a_call_carries_a_traceparent_only_with_tracing(tracing_is_on, traced):
    seen = {}

    class Info(selection_pb2_grpc.SelectionServiceServicer):
        def GetServerInfo(self, request, context):  # noqa: ARG002 - gRPC gives it
            seen.update(context.invocation_metadata())
            return selection_pb2.GetServerInfoResponse()

    if tracing_is_on:
        traced(1)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    selection_pb2_grpc.add_SelectionServiceServicer_to_server(Info(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with jest_trainer.Client(f"127.0.0.1:{port}") as client:
            client.server_info()
    finally:
        server.stop(0).wait()
    assert set(seen) - {"user-agent"} == ({"traceparent"} if tracing_is_on else set())


def test_a_queued_shard_says_nothing_of_traces_unless_there_is_one():
    shard = Shard("0-a-0", "job", "id", "model", "1", ("k",), b"")
    assert b"traceparent" not in pack_shard(shard)


def test_whoever_takes_a_shard_from_redis_learns_its_traceparent():
    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
    shard = Shard("0-a-0", "job", "id", "model", "1", ("k",), b"", traceparent=traceparent)
    assert unpack_shard(shard.ref, "0-a-0", pack_shard(shard)) == shard


def test_log_lines_tell_the_span_they_were_written_in(traced):
    traced(1)
    tracing.start("test")
    with tracing.span("outer"):
        line = _with_trace(None, "info", {"event": "x"})
        _, trace_id, span_id, _ = tracing.traceparent().split("-")
    assert line == {"event": "x", "trace_id": trace_id, "span_id": span_id}
    assert _with_trace(None, "info", {"event": "x"}) == {"event": "x"}
