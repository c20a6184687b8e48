from __future__ import annotations

import pytest

from jest_core import Schedule, SelectionPolicy
from jest_proto.v1 import jobs_pb2
from jest_server.domain.policies import PolicySpec, ScheduleSpec, policy_of
from jest_wire.policies import policy_to_wire, values_to_wire


def test_the_defaults_are_those_of_the_method():
    assert policy_of(PolicySpec(filter_ratio="0.8")) == SelectionPolicy(filter_ratio=0.8)


@pytest.mark.parametrize(
    ("recorded", "message"), [(PolicySpec, jobs_pb2.SelectionPolicy), (ScheduleSpec, jobs_pb2.Schedule)]
)
def test_a_recorded_policy_has_the_fields_of_the_contract(recorded, message):
    assert sorted(recorded.model_fields) == sorted(field.name for field in message.DESCRIPTOR.fields)


@pytest.mark.parametrize(
    ("recorded", "policy"),
    [
        (PolicySpec(sub_batch_size=16, gain=0.5), SelectionPolicy(sub_batch_size=16, gain=0.5)),
        (
            PolicySpec(filter_ratio="0.8", gain_schedule=ScheduleSpec(start=2.0, warmup_steps=5)),
            SelectionPolicy(filter_ratio=0.8, gain=Schedule(start=2.0, warmup_steps=5)),
        ),
        (
            PolicySpec(
                filter_ratio_schedule=ScheduleSpec(shape="cosine", start=0.1, end=0.9, steps=7), max_per_group=2
            ),
            SelectionPolicy(filter_ratio=Schedule(shape="cosine", start=0.1, end=0.9, steps=7), max_per_group=2),
        ),
    ],
)
def test_a_recorded_policy_means_the_same_as_its_message(recorded, policy):
    assert policy_of(recorded) == policy
    assert values_to_wire(recorded.model_dump(exclude_none=True)) == policy_to_wire(policy)


def test_a_combination_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"num_chunks \(9\) is larger than the sub-batch \(8\)"):
        policy_of(PolicySpec(sub_batch_size=8, num_chunks=9))
