"""Examples by reference, through the whole path: trainers name them, scorers read them."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

import jest_trainer as jest
from conformance.speaker import Speaker, fresh_keys, refusal_of, unit_embeddings
from jest_bench.scoring_stack import ScoringStack
from jest_proto.v1 import jobs_pb2
from jest_server.local.triton_server import TritonServer
from jest_server.runtime.settings import ScorerSettings
from jest_server.scorer.__main__ import example_sources
from jest_wire.tensors import as_numpy
from support.learner import TinyLearner
from support.pictures import write_tar
from support.preprocess_tiny import inputs

pytestmark = pytest.mark.skipif(TritonServer.available() is not None, reason=str(TritonServer.available()))

ROWS = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of shards that may be read, beside one that may not."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("train", "private"):
        (folder / name).mkdir()
        for shard in range(2):
            write_tar(folder / name / f"{shard:05d}.tar", ROWS // 2, first=shard * ROWS // 2)
    return folder


@pytest.fixture(scope="module")
def stack(stack_repository, data):
    prefixes = f'["file://{data}/train/"]'
    settings = {"source_prefixes": prefixes, "preprocess": "support.preprocess_tiny:inputs"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
        with ScoringStack(
            stack_repository, scorers=1, settings=settings, selector_settings={"source_prefixes": prefixes}
        ) as stack:
            yield stack


@pytest.fixture
def speaker(stack):
    speaker = Speaker(stack.address, "jest_reference")
    yield speaker
    speaker.close()


def sources(data, *, folder="train", rows=ROWS):
    return [f"file://{data}/{folder}/{row * 2 // ROWS:05d}.tar#{row:06d}" for row in range(rows)]


def read_here(data):
    """The same examples as a trainer would read them."""
    examples = []
    for path in sorted((data / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for name in sorted({name.partition(".")[0] for name in files}):
            image = Image.open(io.BytesIO(files[f"{name}.png"]))
            examples.append(type("Example", (), {"image": image, "caption": files[f"{name}.txt"].decode()}))
    return inputs(examples)


def test_rows_with_a_source_need_no_upload_and_get_the_same_embeddings(stack, speaker, data):
    job, found = speaker.create_job(), {}
    before = stack.inferences()
    for how in ("named", "uploaded"):
        keys = fresh_keys(ROWS)
        named = sources(data) if how == "named" else []
        missing = list(speaker.submit(job.spec.name, how, keys, example_sources=named).missing_positions)
        if how == "uploaded":
            features = read_here(data)
            speaker.upload(job.spec.name, how, missing, {name: array[missing] for name, array in features.items()})
        else:
            assert missing == []
        answer = speaker.select(job.spec.name, how, unit_embeddings(ROWS, seed=3), return_reference_embeddings=True)
        assert answer.reference_inferences == ROWS
        tensors = {tensor.spec.name: tensor for tensor in answer.reference_embeddings}
        found[how] = {
            position: as_numpy(tensors["image_embedding"].spec, tensors["image_embedding"].data)[place].tolist()
            for place, position in enumerate(answer.positions)
        }
    assert stack.inferences() - before == 2 * ROWS
    shared = found["named"].keys() & found["uploaded"].keys()
    assert shared
    for position in shared:
        np.testing.assert_allclose(found["named"][position], found["uploaded"][position], atol=2e-3)


def test_a_repeated_submission_queues_nothing_twice_and_other_sources_are_a_conflict(stack, speaker, data):
    job, keys, before = speaker.create_job(), fresh_keys(ROWS), stack.inferences()
    for _ in range(3):
        speaker.submit(job.spec.name, "sb", keys, example_sources=sources(data))
    with pytest.raises(grpc.RpcError) as caught:
        speaker.submit(job.spec.name, "sb", keys, example_sources=sources(data)[::-1])
    assert refusal_of(caught.value).reason == "SUPER_BATCH_CONFLICT"
    speaker.select(job.spec.name, "sb", unit_embeddings(ROWS, seed=3))
    assert stack.inferences() - before == ROWS


def test_some_rows_may_be_named_and_others_uploaded(speaker, data):
    job, keys = speaker.create_job(), fresh_keys(ROWS)
    named = [source if row % 2 else "" for row, source in enumerate(sources(data))]
    missing = list(speaker.submit(job.spec.name, "sb", keys, example_sources=named).missing_positions)
    assert missing == list(range(0, ROWS, 2))
    speaker.upload(job.spec.name, "sb", missing, {n: a[missing] for n, a in read_here(data).items()})
    assert speaker.select(job.spec.name, "sb", unit_embeddings(ROWS, seed=3)).reference_inferences == ROWS


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("file://{data}/private/00000.tar#000000", "expected a URL that starts with one of"),
        ("file://{data}/train/../private/00000.tar#000000", "without empty parts, '.' or '..'"),
        ("file:///etc/passwd", "expected a URL that starts with one of"),
        ("http://169.254.169.254/latest/meta-data/a.png", "expected a URL that starts with one of"),
        ("file://{data}/train/00000.tar", "expected URL.tar#KEY"),
    ],
)
def test_a_source_that_may_not_be_read_is_refused_at_the_door(speaker, data, source, says):
    job, keys = speaker.create_job(), fresh_keys(16)
    named = [*sources(data, rows=15), source.format(data=data)]
    with pytest.raises(grpc.RpcError) as caught:
        speaker.submit(job.spec.name, "sb", keys, example_sources=named)
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["example_sources[15]"])
    assert says in refusal.message
    assert speaker.jobs.GetJob(jobs_pb2.GetJobRequest(name=job.spec.name)).job.counters.submitted == 0


def test_sources_that_are_not_one_for_each_row_are_refused(speaker, data):
    job = speaker.create_job()
    with pytest.raises(grpc.RpcError) as caught:
        speaker.submit(job.spec.name, "sb", fresh_keys(16), example_sources=sources(data, rows=15))
    assert "example_sources holds 15 sources, expected 16" in caught.value.details()


def test_a_source_that_is_not_there_sets_its_super_batch_aside_and_no_other(speaker, data):
    job = speaker.create_job()
    named = [*sources(data, rows=15), f"file://{data}/train/00000.tar#999999"]
    speaker.submit(job.spec.name, "broken", fresh_keys(16), example_sources=named)
    with pytest.raises(grpc.RpcError) as caught:
        speaker.select(job.spec.name, "broken", unit_embeddings(16, seed=0))
    refusal = refusal_of(caught.value)
    assert refusal.reason == "DEAD_LETTERED"
    speaker.submit(job.spec.name, "whole", fresh_keys(16), example_sources=sources(data, rows=16))
    assert len(speaker.select(job.spec.name, "whole", unit_embeddings(16, seed=0)).positions) == 4


def test_a_training_loop_names_its_examples(stack, data, unique):
    features, learner = read_here(data), TinyLearner(seed=0)
    policy = jest.SelectionPolicy(filter_ratio=0.75, num_chunks=4)
    with jest.Client(stack.address, deadline_s=30) as client:
        job = client.create_job(unique("named"), reference_model="jest_reference", policy=policy)
        batch = {"keys": fresh_keys(ROWS), "source": sources(data)}
        batch |= {name: torch.from_numpy(array) for name, array in features.items()}
        batches = jest.SelectedBatches(
            job, [batch], keys=lambda b: b["keys"], sources=lambda b: b["source"], embed=learner.embed
        )
        (chosen,) = list(batches)
        assert len(chosen["keys"]) == len(chosen["source"]) == 16
        assert job.counters().reference_inferences == ROWS


def test_a_scorer_that_is_told_to_read_and_not_how_does_not_start():
    with pytest.raises(ValueError, match="JEST_PREPROCESS is not set, expected MODULE:FUNCTION"):
        example_sources(ScorerSettings(source_prefixes=("file:///data/",)))
    assert example_sources(ScorerSettings()) is None
