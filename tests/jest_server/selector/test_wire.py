from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration

from jest_proto.v1.selection_pb2 import SelectSubBatchHeader, StepTimes
from jest_server.selector.learner_outputs.header import digest_of
from jest_server.selector.wire import LONGEST_PHASE_S, step_times_from_wire


def test_what_a_trainer_tells_of_its_step_is_read_in_seconds_and_nothing_unset_counts():
    told = StepTimes(load=Duration(nanos=250_000_000), train=Duration(seconds=2))
    assert step_times_from_wire(told) == {"load": 0.25, "embed": 0.0, "select": 0.0, "train": 2.0}


@pytest.mark.parametrize(
    ("told", "counted"),
    [
        (Duration(seconds=-5), 0.0),
        (Duration(nanos=-1), 0.0),
        (Duration(seconds=-(2**63)), 0.0),
        (Duration(seconds=2**63 - 1, nanos=2**31 - 1), LONGEST_PHASE_S),
        (Duration(seconds=4000), LONGEST_PHASE_S),
    ],
)
def test_nonsense_counts_for_no_less_than_nothing_and_no_more_than_an_hour(told, counted):
    assert step_times_from_wire(StepTimes(select=told))["select"] == counted


def test_a_repeated_call_may_tell_other_times():
    header = SelectSubBatchHeader(job="j", super_batch_id="s")
    header.embeddings.scale = 10
    again = SelectSubBatchHeader()
    again.CopyFrom(header)
    again.last_step.train.seconds = 3
    assert digest_of(again) == digest_of(header)
