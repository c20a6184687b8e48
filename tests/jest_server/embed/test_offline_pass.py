"""Embedding input shards with a model that does as it is told."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from jest_server.domain.errors import ReferenceModelError
from jest_server.domain.references import ReferenceInput
from jest_server.embed import offline_pass
from jest_server.embed.offline_pass import OfflinePass, Stopped
from jest_server.embed.progress import Progress
from jest_server.examples.options import EmbedOptions
from jest_server.examples.preprocessing import Preprocessing, PreprocessingError
from jest_server.examples.shards import input_shards
from jest_server.stores.embedding_files.folder import EmbeddingFolder
from jest_server.stores.embedding_files.format import shard_of, space_of
from support.embedding_shards import reference_info
from support.example_data import example_members, hash_of, write_tar
from support.polling import within

INFO = reference_info(inputs=(ReferenceInput(name="x", datatype="INT64", shape=()),))


class ObedientModel:
    """Embeds x to rows of x; raises what it is given."""

    def __init__(self):
        self.reference = INFO
        self.errors = []
        self.batches = []

    async def info(self):
        return self.reference

    async def embed(self, inputs):
        self.batches.append(len(inputs["x"]))
        if self.errors:
            raise self.errors.pop(0)
        return np.broadcast_to(inputs["x"][:, None, None], (len(inputs["x"]), 2, 4)).astype(np.float32)


def number_of(key):
    return hash_of(key) % 1000


def numbers(examples):
    if any(example.caption == "a bad" for example in examples):
        raise ValueError("bad example")
    return {"x": np.array([number_of(example.key) for example in examples])}


class Setting:
    """A data set, a model and an output."""

    def __init__(self, folder):
        self.data, self.output = folder / "data", folder / "out"
        self.data.mkdir()
        self.model, self.stop = ObedientModel(), asyncio.Event()

    def add(self, name, keys):
        write_tar(self.data / name, example_members(keys))

    async def run(self, *, function=numbers, **others):
        options = EmbedOptions(data=f"{self.data}/*.tar", output=str(self.output), preprocess="m:f", **others)
        preprocessing = Preprocessing("m:f", function, INFO)
        shards = input_shards(options)
        with Progress(len(shards)) as progress:
            done = OfflinePass(self.model, INFO, preprocessing, self.folder, options, progress, self.stop)
            await done.run(shards)
        return done.summary

    @property
    def folder(self):
        return EmbeddingFolder(str(self.output), space_of(INFO))

    def manifest(self, name):
        return self.folder.manifest(shard_of((self.data / name).as_uri()))


@pytest.fixture
def setting(tmp_path):
    return Setting(tmp_path)


async def test_every_shard_is_written_with_what_it_came_from(setting):
    setting.add("0.tar", ["a", "b", "c"])
    setting.add("1.tar", [])
    summary = await setting.run(batch=2, key="set/{key}")
    assert (summary.written, summary.rows, summary.failed) == (2, 3, 0)
    assert setting.model.batches == [2, 1]
    manifest = setting.manifest("0.tar")
    assert manifest.is_of(INFO)
    assert (manifest.rows, manifest.key, manifest.left_out) == (3, "set/{key}", {})
    assert manifest.source_bytes == (setting.data / "0.tar").stat().st_size
    assert setting.manifest("1.tar").rows == 0


async def test_what_is_there_is_not_done_again(setting):
    setting.add("0.tar", ["a"])
    await setting.run()
    summary = await setting.run(batch=7)
    assert (summary.written, summary.skipped, setting.model.batches) == (0, 1, [1])


@pytest.mark.parametrize("change", ["key", "caption", "input", "manifest"])
async def test_what_was_made_from_something_else_is_made_anew(setting, change):
    setting.add("0.tar", ["a"])
    await setting.run()
    if change == "input":
        setting.add("0.tar", ["a"] + [f"b{i}" for i in range(20)])
    if change == "manifest":
        setting.folder._put(f"{shard_of((setting.data / '0.tar').as_uri())}.json", b"{")
    others = {"key": {"key": "x/{key}"}, "caption": {"caption": "json:c", "max_left_out": 1}}.get(change, {})
    assert (await setting.run(**others)).written == 1


async def test_examples_that_cannot_be_embedded_are_counted_where_their_share_is_small(setting):
    setting.add("0.tar", ["a", "b", "bad", "c", "a"])
    summary = await setting.run(batch=3, max_left_out=0.4)
    expected = {"preprocessing failed": 1, "repeated key": 1}
    assert (summary.rows, summary.left_out, setting.manifest("0.tar").left_out) == (3, expected, expected)


async def test_a_shard_with_too_many_of_them_fails_alone(setting):
    setting.add("0.tar", ["a", "bad"])
    setting.add("1.tar", ["c"])
    summary = await setting.run(max_left_out=0.49)
    assert (summary.failed, summary.written) == (1, 1)
    assert setting.manifest("0.tar") is None


async def test_a_shard_that_cannot_be_read_fails_alone(setting):
    (setting.data / "0.tar").write_bytes(b"nonsense")
    setting.add("1.tar", ["c"])
    summary = await setting.run()
    assert (summary.failed, summary.written) == (1, 1)


async def test_a_batch_that_the_model_refuses_fails_its_shard_alone(setting):
    setting.add("0.tar", ["a"])
    setting.add("1.tar", ["c"])
    setting.model.errors = [ReferenceModelError("token 5000", retryable=False)]
    summary = await setting.run()
    assert (summary.failed, summary.written) == (1, 1)


async def test_an_output_that_cannot_be_read_fails_the_shard(setting):
    setting.add("0.tar", ["a"])
    setting.output.write_text("a file where a folder should be")
    assert (await setting.run()).failed == 1


async def test_an_output_that_cannot_be_written_fails_the_shard(setting, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(EmbeddingFolder, "write", full)
    setting.add("0.tar", ["a"])
    assert (await setting.run()).failed == 1


async def test_a_passing_failure_of_the_model_is_tried_again(setting, monkeypatch):
    monkeypatch.setattr(offline_pass, "RETRY_S", 0.01)
    setting.add("0.tar", ["a"])
    setting.model.errors = [ReferenceModelError("hiccup", retryable=True)] * 2
    assert (await setting.run()).written == 1


async def test_a_model_that_stays_away_ends_the_run(setting, monkeypatch):
    monkeypatch.setattr(offline_pass, "RETRY_S", 0.001)
    setting.add("0.tar", ["a"])
    setting.model.errors = [ReferenceModelError("away", retryable=True)] * offline_pass.ATTEMPTS
    with pytest.raises(ReferenceModelError, match="away"):
        await setting.run()


async def test_a_model_that_was_replaced_ends_the_run(setting):
    setting.add("0.tar", ["a"])
    setting.model.reference = INFO.model_copy(update={"version": "2"})
    with pytest.raises(ReferenceModelError, match="replaced by another"):
        await setting.run()


async def test_preprocessing_that_does_not_fit_the_model_ends_the_run(setting):
    setting.add("0.tar", ["a"])
    with pytest.raises(PreprocessingError, match="datatype of input x: float64, expected int64"):
        await setting.run(function=lambda examples: {"x": np.zeros(len(examples))})


async def test_a_stop_takes_effect_after_the_batch_and_leaves_nothing_half(setting):
    setting.add("0.tar", ["a", "b", "c"])
    entered, released = threading.Event(), threading.Event()

    def slow(examples):
        entered.set()
        released.wait(30)
        return numbers(examples)

    running = asyncio.create_task(setting.run(batch=1, function=slow))
    while not entered.is_set():
        await asyncio.sleep(0.01)
    setting.stop.set()
    released.set()
    with pytest.raises(Stopped):
        await running
    assert setting.model.batches == [1]
    assert setting.folder.stamps() == {}


async def test_a_stop_ends_waiting_for_a_model_that_is_away(setting):
    setting.add("0.tar", ["a"])
    setting.model.errors = [ReferenceModelError("away", retryable=True)] * 10
    running = asyncio.create_task(setting.run())
    while not setting.model.batches:
        await asyncio.sleep(0.01)
    setting.stop.set()
    with within(0.9), pytest.raises(Stopped):
        await running
