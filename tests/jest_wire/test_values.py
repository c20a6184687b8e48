from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration

from jest_proto.v1 import jobs_pb2 as pb
from jest_wire.values import FieldError, duration, enum_name, enum_name_or_number, enum_value, seconds, timestamp


@pytest.mark.parametrize("enum", [pb.Scoring, pb.Loss, pb.Sampler, pb.Fallback, pb.Schedule.Shape])
def test_every_name_of_an_enum_comes_back(enum):
    for number in enum.values():
        assert enum_value(enum, enum_name(enum, number, "field")) == number


def test_the_prefix_is_not_part_of_a_name():
    assert enum_value(pb.Scoring, "hard_learner") == pb.SCORING_HARD_LEARNER
    assert enum_name(pb.Schedule.Shape, pb.Schedule.SHAPE_COSINE, "shape") == "cosine"


def test_an_unknown_number_is_refused_with_field_value_and_expectation():
    with pytest.raises(FieldError) as caught:
        enum_name(pb.Sampler, 77, "policy.sampler")
    assert caught.value.field == "policy.sampler"
    assert str(caught.value) == "policy.sampler is 77, expected one of SAMPLER_GUMBEL, SAMPLER_TOP_K"


def test_an_unknown_number_keeps_its_number_where_a_peer_may_be_newer():
    assert [enum_name_or_number(pb.Sampler, number) for number in (pb.SAMPLER_TOP_K, 77)] == ["top_k", "77"]


def test_seconds_come_back_from_a_duration():
    assert duration(1.25) == Duration(seconds=1, nanos=250_000_000)
    assert seconds(duration(1.25)) == 1.25


def test_a_timestamp_counts_from_1970():
    assert timestamp(1.5).ToJsonString() == "1970-01-01T00:00:01.500Z"
