"""What a scorer adds to the trace of who queued a shard."""

from __future__ import annotations

import time

import numpy as np
import pytest

from jest_server.domain.errors import ReferenceModelError, UnreadableSource
from jest_server.stores import blobs
from jest_wire import tracing

TRACE, CALL = "a" * 32, "b" * 16
TRACEPARENT = f"00-{TRACE}-{CALL}-01"


@pytest.fixture
def spans(collector):
    """Ends tracing, and tells what was recorded under the call that queued, by name."""
    tracing.start("jest-scorer")

    def ended():
        tracing.stop()
        spans = sorted(collector.spans(), key=lambda s: s.end_s)
        assert {s.trace_id for s in spans} == {TRACE}
        return {name: [s for s in spans if s.name == name] for name in sorted({s.name for s in spans})}

    return ended


class Pictures:
    """Reads what it is told to."""

    async def inputs(self, _reference, sources):
        if "broken" in sources:
            raise UnreadableSource("SOURCE_BROKEN", "broken is no picture")
        return {"x": np.array([int(source) for source in sources], np.int64)}


async def test_the_wait_in_the_queue_ends_where_the_work_begins(bench, spans):
    queued_s = time.time()
    super_batch_id = await bench.queue(["a", "b"], traceparent=TRACEPARENT)
    time.sleep(0.3)  # noqa: ASYNC251 - nobody else is at work
    async with bench.working(consumer="me"):
        await bench.scored(super_batch_id)
    found = spans()
    (queue,), (shard,) = found["scorer.queue"], found["scorer.shard"]
    assert queue.start_s == pytest.approx(queued_s, abs=0.2)
    assert queue.start_s + 0.3 <= queue.end_s <= shard.start_s
    assert queue.parent_id == shard.parent_id == CALL
    assert queue.attributes == {
        "jest.job": bench.job,
        "jest.super_batch": super_batch_id,
        "jest.shard": "0-u-0",
        "jest.examples": 2,
        "jest.deliveries": 1,
        "jest.consumer": "me",
    }


async def test_an_attempt_that_fails_shows_beside_the_one_that_works(bench, spans):
    bench.model.errors = [ReferenceModelError("hiccup", retryable=True)]
    async with bench.working():
        await bench.scored(await bench.queue(["a"], traceparent=TRACEPARENT))
    found = spans()
    assert [s.status for s in found["scorer.shard"]] == ["error", "unset"]
    assert len(found["scorer.queue"]) == 1


async def test_a_shard_of_an_untraced_selector_makes_no_trace_for_its_wait_alone(bench, collector):
    tracing.start("jest-scorer")
    async with bench.working():
        await bench.scored(await bench.queue(["a"]))
    tracing.stop()
    assert not collector.named("scorer.queue")


@pytest.mark.parametrize(("source", "status"), [("7", "unset"), ("broken", "error")])
async def test_reading_by_reference_has_a_span(bench, spans, source, status):
    async with bench.working(sources=Pictures()):
        super_batch_id = await bench.queue(["a"], features=blobs.pack({"sources": [source]}), traceparent=TRACEPARENT)
        await (bench.scored if status == "unset" else bench.dead)(super_batch_id)
    found = spans()
    (read,) = found["scorer.read"]
    assert read.status == status
    told = [(s.attributes["jest.reason"], s.attributes["jest.detail"]) for s in found.get("scorer.dead_letter", [])]
    assert told == ([] if status == "unset" else [("SOURCE_BROKEN", "broken is no picture")])
