"""Runs of a job's training loop: a script that runs again meets nothing of the run before."""

from __future__ import annotations

import grpc
import pytest

from conformance.speaker import fresh_keys, refused, unit_embeddings
from jest_proto.v1 import jobs_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNIFORM = {"policy": jobs_pb2.SelectionPolicy(filter_ratio="0.75", num_chunks=4, scoring=jobs_pb2.SCORING_UNIFORM)}


@pytest.fixture
def job(speaker):
    """A job that needs no reference model."""
    return speaker.create_job(reference_model="", **UNIFORM).spec.name


def test_a_second_run_of_the_same_steps_with_other_rows_is_no_conflict(speaker, job):
    for process in ("first", "second"):
        attempt = speaker.open_attempt(job, process)
        assert speaker.open_attempt(job, process) == attempt
        for step in range(2):
            assert not speaker.submit(job, f"{attempt}-0-{step}", fresh_keys(16), step=step).decided
    assert (speaker.open_attempt(job, "third"), attempt) == ("a3", "a2")


def test_a_job_draws_the_same_at_the_same_step_of_every_attempt(speaker, job, uniform_choice):
    chosen = []
    for process in ("first", "second"):
        attempt = speaker.open_attempt(job, process)
        chosen.append([uniform_choice(job, f"{attempt}-0-{step}", step) for step in range(3)])
    assert chosen[0] == chosen[1]
    assert chosen[0][0] != chosen[0][1]


@pytest.fixture
def uniform_choice(speaker):
    """Selects 4 of 16 rows at random."""
    keys = fresh_keys(16)

    def choose(job, super_batch_id, step):
        speaker.submit(job, super_batch_id, keys, step=step)
        return list(speaker.select(job, super_batch_id, unit_embeddings(16, seed=step)).positions)

    return choose


def test_an_attempt_that_was_superseded_takes_nothing_more_and_names_who_did_it(speaker, job):
    old = speaker.open_attempt(job, "old")
    speaker.submit(job, f"{old}-0-0", fresh_keys(16))
    new = speaker.open_attempt(job, "new")
    refusal = refused(speaker.submit, job, f"{old}-0-1", fresh_keys(16), step=1)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ATTEMPT_SUPERSEDED")
    assert f"rank 0 opened attempt '{new}'" in refusal.message
    late = refused(speaker.select, job, f"{old}-0-0", unit_embeddings(16, seed=0))
    assert late.reason == "ATTEMPT_SUPERSEDED"
    counters = speaker.jobs.GetJob(jobs_pb2.GetJobRequest(name=job)).job.counters
    assert (counters.submitted, counters.dead_lettered, counters.in_flight) == (1, 1, 0)


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"process": ""}, "process_nonce", "1 to 64 characters"),
        ({"process": "a/b"}, "process_nonce", "'a/b'"),
        ({"launch": "x" * 129}, "launch", "129 bytes, the limit is 128"),
        ({"parent": "a1"}, "parent_step", "expected both or neither"),
        ({"parent_step": 3}, "parent_step", "expected both or neither"),
        ({"parent": "first", "parent_step": 3}, "parent", "expected an attempt"),
        ({"world_size": 2}, "world_size", "was created with 1"),
        ({"rank": 1}, "rank", "expected 0 to 0"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_by_field(speaker, job, fields, field, message):
    refusal = refused(speaker.open_attempt, job, **{"process": "p"} | fields)
    assert (refusal.code, refusal.fields) == (INVALID, [field])
    assert message in refusal.message


def test_a_parent_has_to_be_an_attempt_of_the_job(speaker, job):
    refusal = refused(speaker.open_attempt, job, "p", parent="a7", parent_step=0)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "ATTEMPT_UNKNOWN")
    assert "'a7'" in refusal.message


def test_a_super_batch_of_an_attempt_that_was_never_opened_is_refused(speaker, job):
    refusal = refused(speaker.submit, job, "a1-0-0", fresh_keys(16))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "ATTEMPT_UNKNOWN")
