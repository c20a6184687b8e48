"""What policies promise beyond one process: fallbacks of every loss while no scorer answers; decisions to replay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from google.protobuf.duration_pb2 import Duration

from conformance.speaker import Speaker, features, fresh_keys, unit_embeddings
from jest_core import Embeddings
from jest_proto.v1 import jobs_pb2
from jest_server.domain.super_batches import Submission, SuperBatchRef
from jest_server.selector.decide.selection import replay
from jest_server.selector.learner_outputs.pending_selections import LearnerOutputs
from jest_server.stores.redis.stores import open_redis_stores

ROWS = 16


@pytest.fixture
def speaker(stack):
    speaker = Speaker(stack.address, "jest_reference")
    yield speaker
    speaker.close()


def select(speaker, name, loss):
    if loss == jobs_pb2.LOSS_PAIRWISE:
        losses = np.random.default_rng(0).random((ROWS, ROWS), np.float32)
        return speaker.select_pairs(name, "sb", {(0, 0): losses})
    return speaker.select(name, "sb", unit_embeddings(ROWS, seed=0))


@pytest.mark.parametrize("loss", [jobs_pb2.LOSS_SIGMOID, jobs_pb2.LOSS_SOFTMAX, jobs_pb2.LOSS_PAIRWISE])
@pytest.mark.parametrize(
    ("fallback", "scoring"),
    [
        (jobs_pb2.FALLBACK_UNIFORM, jobs_pb2.SCORING_UNIFORM),
        (jobs_pb2.FALLBACK_HARD_LEARNER, jobs_pb2.SCORING_HARD_LEARNER),
    ],
)
def test_a_late_reference_is_done_without_as_a_job_without_one_would(stack, speaker, loss, fallback, scoring):
    shared = {"sub_batch_size": 4, "num_chunks": 2, "loss": loss, "weights": True}
    late = speaker.create_job(
        policy=jobs_pb2.SelectionPolicy(**shared), fallback=fallback, reference_timeout=Duration(seconds=1)
    )
    without = speaker.create_job(policy=jobs_pb2.SelectionPolicy(scoring=scoring, **shared), reference_model="")
    keys = fresh_keys(ROWS)
    speaker.submit(without.spec.name, "sb", keys)
    expected = select(speaker, without.spec.name, loss)
    with stack.paused("scorer"):
        speaker.submit(late.spec.name, "sb", keys)
        speaker.upload(late.spec.name, "sb", list(range(ROWS)), features(late, keys))
        answer = select(speaker, late.spec.name, loss)
    assert answer.fallback == fallback
    assert "reference_timeout" in answer.fallback_reason
    assert (list(answer.positions), list(answer.weights)) == (list(expected.positions), list(expected.weights))


async def test_a_scheduled_jobs_decision_is_computed_again_from_what_the_store_kept(stack, speaker):
    policy = jobs_pb2.SelectionPolicy(
        num_chunks=2,
        scoring=jobs_pb2.SCORING_HARD_LEARNER,
        loss=jobs_pb2.LOSS_SOFTMAX,
        weights=True,
        max_per_group=2,
        filter_ratio_schedule=jobs_pb2.Schedule(shape=jobs_pb2.Schedule.SHAPE_LINEAR, start=0.5, end=0.75, steps=10),
        gain_schedule=jobs_pb2.Schedule(shape=jobs_pb2.Schedule.SHAPE_COSINE, start=1, end=4, steps=10),
    )
    job, keys = speaker.create_job(policy=policy, reference_model=""), fresh_keys(ROWS)
    labels = [str(row % 5) for row in range(ROWS)]
    image, text = unit_embeddings(ROWS, seed=3)
    speaker.submit(job.spec.name, "sb", keys, step=4, group_labels=labels)
    answer = speaker.select(job.spec.name, "sb", (image, text), scale=10.0, bias=-10.0)

    stores = open_redis_stores(f"{stack.valkey.url}/0")
    decision = await stores.decisions.get_decision(SuperBatchRef(job.spec.name, "sb"))
    await stores.connection.close()
    submission = Submission(
        job=job.spec.name,
        super_batch_id="sb",
        rank=0,
        world_size=1,
        keys=tuple(keys),
        step=4,
        group_labels=tuple(labels),
    )
    learner = Embeddings(torch.from_numpy(image), torch.from_numpy(text), scale=10.0, bias=-10.0)
    outputs = {0: LearnerOutputs(learner, "")}
    again = replay(decision, {0: submission}, outputs, reference=None, device=torch.device("cpu"))
    assert list(again.positions[0]) == list(answer.positions)
    assert list(again.weights[0]) == list(answer.weights)
    assert (again.gain, again.sub_batch_size) == (answer.gain, answer.sub_batch_size)
    assert decision.step == 4
