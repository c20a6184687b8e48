import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jest_core_oracle as oracle
from jest_core import Schedule

LINEAR = {"shape": "linear", "start": 0.2, "end": 0.8, "steps": 10}
NUMBERS = st.floats(-1000, 1000)


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, object]:
    fields = {"start": draw(NUMBERS), "warmup_steps": draw(st.integers(0, 50))}
    shape = draw(st.sampled_from(["constant", "linear", "cosine"]))
    if shape != "constant":
        fields |= {"end": draw(NUMBERS), "steps": draw(st.integers(1, 200))}
    return {**fields, "shape": shape}


@given(fields=schedules(), step=st.integers(0, 300))
def test_values_equal_the_oracle(fields, step):
    assert Schedule(**fields).at(step) == pytest.approx(oracle.scheduled(step, **fields), rel=1e-12, abs=6e-10)


@given(fields=schedules(), step=st.integers(0, 10**12))
def test_no_value_leaves_the_bounds(fields, step):
    schedule = Schedule(**fields)
    least, largest = schedule.bounds()
    assert least - 1e-9 <= schedule.at(step) <= largest + 1e-9


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_way_begins_and_ends_where_it_is_said_to(shape):
    schedule = Schedule(shape=shape, start=0.25, end=0.75, steps=8)
    assert (schedule.at(0), schedule.at(4), schedule.at(8)) == (0.25, 0.5, 0.75)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_after_its_steps_the_value_stays(shape):
    schedule = Schedule(shape=shape, start=0.25, end=0.75, steps=8, warmup_steps=3)
    assert {schedule.at(step) for step in (11, 12, 100, 10**15)} == {0.75}


def test_a_cosine_starts_and_stops_more_gently_than_a_line():
    line = Schedule(shape="linear", start=0.0, end=1.0, steps=100)
    cosine = Schedule(shape="cosine", start=0.0, end=1.0, steps=100)
    assert cosine.at(10) < line.at(10)
    assert cosine.at(90) > line.at(90)


def test_the_warm_up_rises_from_nothing_and_delays_the_rest():
    schedule = Schedule(**LINEAR, warmup_steps=4)
    assert [schedule.at(step) for step in range(6)] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.26])


def test_a_constant_has_its_warm_up_as_well():
    schedule = Schedule(start=3.0, warmup_steps=2)
    assert [schedule.at(step) for step in range(4)] == [0, 1.5, 3, 3]


@pytest.mark.parametrize(
    ("fields", "bounds"),
    [
        (LINEAR, (0.2, 0.8)),
        ({**LINEAR, "start": 0.9}, (0.8, 0.9)),
        ({**LINEAR, "warmup_steps": 1}, (0, 0.8)),
        ({"start": 0.5}, (0.5, 0.5)),
        ({"start": -0.5, "warmup_steps": 1}, (-0.5, 0)),
    ],
)
def test_bounds_are_the_extremes_of_all_steps(fields, bounds):
    assert Schedule(**fields).bounds() == bounds


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**LINEAR, "shape": "square"}, r"shape \('square'\) must be one of constant, linear, cosine"),
        ({**LINEAR, "start": math.nan}, r"start \(nan\) must be a finite number"),
        ({**LINEAR, "start": None}, r"start \(None\) must be a finite number"),
        ({**LINEAR, "start": True}, r"start \(True\) must be a finite number"),
        ({**LINEAR, "end": math.inf}, r"end \(inf\) must be a finite number"),
        ({**LINEAR, "end": None}, r"end \(None\) must be a finite number"),
        ({**LINEAR, "end": "0.8"}, r"end \('0.8'\) must be a finite number"),
        ({**LINEAR, "steps": None}, r"steps \(None\) must be an integer of at least 1"),
        ({**LINEAR, "steps": 0}, r"steps \(0\) must be an integer of at least 1"),
        ({**LINEAR, "steps": 10.0}, r"steps \(10.0\) must be an integer of at least 1"),
        ({**LINEAR, "warmup_steps": -1}, r"warmup_steps \(-1\) must be an integer of at least 0"),
        ({**LINEAR, "warmup_steps": True}, r"warmup_steps \(True\) must be an integer of at least 0"),
        ({"start": 0.5, "end": 0.8}, r"end \(0.8\) must be None for the shape 'constant'"),
        ({"start": 0.5, "steps": 8}, r"steps \(8\) must be None for the shape 'constant'"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)


@pytest.mark.parametrize("step", [-1, 1.0, True, None])
def test_a_step_that_is_no_step_is_an_error(step):
    with pytest.raises(ValueError, match=r"step \(.*\) must be an integer of at least 0"):
        Schedule(**LINEAR).at(step)


@given(fields=schedules())
def test_a_schedule_survives_json(fields):
    schedule = Schedule(**fields)
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": "constant"}, "start must be given for a schedule"),
        (
            {"start": 0.5, "stop": 0.8},
            r"unknown schedule fields: stop \(known: end, shape, start, steps, warmup_steps\)",
        ),
        ({**LINEAR, "steps": "ten"}, r"steps \('ten'\) must be an integer"),
    ],
)
def test_a_dictionary_that_is_no_schedule_is_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_dict(values)
