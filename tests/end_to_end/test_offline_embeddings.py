"""A data set embedded offline, then a training job over it: nothing is uploaded and nothing is inferred."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import jest_trainer
from jest_core import Embeddings, SelectionPolicy, select_sub_batch, selection_seed
from jest_server.domain.embedding_codec import CODECS
from jest_server.examples.decoding import Example
from jest_server.local.stack import Stack
from support.example_data import example_members, hash_of, png, tiny_inputs, write_tar
from support.learner import TinyLearner, super_batches
from support.stack import WIDTH

ROWS = 64
KEYS = [[f"{shard}-{i:02}" for i in range(ROWS)] for shard in range(2)]
POLICY = SelectionPolicy(filter_ratio=0.75, num_chunks=4)


@pytest.fixture
def embeddings_url(tmp_path, stack_repository):
    """Embeddings of a data set of two shards."""
    for shard, keys in enumerate(KEYS):
        write_tar(tmp_path / f"{shard}.tar", example_members(keys))
    options = ["--data", "{0..1}.tar", "--output", "out", "--preprocess", "support.example_data:tiny_inputs"]
    env = {
        "JEST_REFERENCE_BACKEND": "in_process",
        "JEST_MODEL_REPOSITORY": str(stack_repository),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", "from jest_server.cli.app import main; main()", "embed", "--key", "{shard}/{key}"]
    subprocess.run(command + options, cwd=tmp_path, env=os.environ | env, check=True, timeout=60)
    return str(tmp_path / "out")


def examples_of(keys):
    return [Example(key, Image.open(io.BytesIO(png(hash_of(key)))), f"a {key}") for key in keys]


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_job_over_a_data_set_that_was_embedded_offline_costs_no_inference(
    embeddings_url, precision, stack_repository, reference_towers, monkeypatch
):
    """And chooses what it would have chosen from fresh embeddings in the cache's precision."""
    monkeypatch.setenv("JEST_EMBEDDINGS_URL", embeddings_url)
    monkeypatch.setenv("JEST_CACHE_PRECISION", precision)
    learner, asked = TinyLearner(seed=0), []

    def features(batch):
        asked.append(batch["keys"])
        return {"image": batch["image"], "tokens": batch["tokens"]}

    data = list(super_batches(count=2, rows=ROWS, seed=3))
    for shard, batch in enumerate(data):
        batch["keys"] = [f"{shard}/{key}" for key in KEYS[shard]]
    with Stack(stack_repository) as stack, jest_trainer.Client(stack.address, deadline_s=30) as client:
        job = client.create_job("offline", reference_model="jest_reference", policy=POLICY, seed=5)
        batches = jest_trainer.SelectedBatches(
            job, data, keys=lambda batch: batch["keys"], features=features, embed=learner.embed
        )
        chosen = [batch["keys"] for batch in batches]
        counters, reference = job.counters(), job.reference
        found = metric(stack.endpoints()["selector metrics"], "jest_embedding_file_hits_total")
    assert len(asked) == 1  # to be checked, not to be uploaded
    assert (counters.selected, counters.reference_inferences, counters.cache_hits) == (2, 0, 2 * ROWS)
    assert found == 2 * ROWS
    for step, (batch, keys, selected) in enumerate(zip(data, KEYS, chosen, strict=True)):
        inputs = {name: torch.from_numpy(array) for name, array in tiny_inputs(examples_of(keys)).items()}
        image, text = as_cached(torch.stack(reference_towers(inputs), 1).half(), precision)
        fresh = Embeddings(image, text, scale=reference.scale, bias=reference.bias)
        expected = select_sub_batch(learner.embed(batch), fresh, POLICY, seed=selection_seed(5, step))
        assert selected == [batch["keys"][p] for p in expected.positions.tolist()]


def as_cached(embeddings, precision):
    """Rounds ``[n, 2, D]`` as a cache of the precision does, and parts images and texts."""
    codec = CODECS[precision]
    rows = codec.decode(codec.encode([row.tobytes() for row in embeddings.numpy()], WIDTH), WIDTH)
    rounded = np.frombuffer(b"".join(rows), np.float16).reshape(-1, 2, WIDTH).swapaxes(0, 1)
    return torch.from_numpy(rounded.copy())


def metric(url, name):
    with urllib.request.urlopen(url) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)
