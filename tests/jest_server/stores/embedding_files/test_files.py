"""Looking embeddings up in files: what is found, what counts as absent, and what is never believed."""

from __future__ import annotations

import asyncio
import threading
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from jest_server.runtime.metrics import EmbeddingFileMetrics
from jest_server.stores.embedding_files import files as embedding_files
from jest_server.stores.embedding_files.files import EmbeddingFiles
from jest_server.stores.embedding_files.folder import EmbeddingFolder
from jest_server.stores.embedding_files.format import space_of
from support.embedding_shards import embeddings_of, packed, reference_info, write_shard
from support.polling import wait_for

KEYS = [f"k{i}" for i in range(50)]
VALUES = dict(zip(KEYS, embeddings_of(KEYS), strict=True))
ALWAYS = 1e-9
"""Listed again with every call."""


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    return str(tmp_path / "embeddings") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


class Counted(EmbeddingFiles):
    """With its own metrics at hand."""

    def __init__(self, url, **options):
        self.registry = CollectorRegistry()
        super().__init__(url, EmbeddingFileMetrics(self.registry), **options)

    def problems(self, kind):
        return self.registry.get_sample_value("jest_embedding_file_problems_total", {"kind": kind}) or 0

    @property
    def hits(self):
        return self.registry.get_sample_value("jest_embedding_file_hits_total")


@pytest.fixture
async def make_files(url):
    made = []

    def make(**options):
        made.append(Counted(url, **options))
        return made[-1]

    yield make
    for files in made:
        await files.close()


def the_bytes(*keys):
    return [VALUES[key].tobytes() if key in VALUES else None for key in keys]


async def test_rows_of_several_files_are_found_in_the_order_asked(url, make_files):
    info = reference_info()
    write_shard(url, info, {key: VALUES[key] for key in KEYS[:20]}, "000.tar")
    write_shard(url, info, {key: VALUES[key] for key in KEYS[20:]}, "001.tar")
    files, asked = make_files(), [*reversed(KEYS), "nobody", "k3", "k3"]
    assert await files.get(info, asked) == the_bytes(*asked)
    assert files.hits == 52


async def test_where_there_are_no_files_nothing_is_found_and_nothing_is_wrong(url, make_files):
    files = make_files()
    assert await files.get(reference_info(), ["a"]) == [None]
    assert files.problems("listing") == 0


async def test_asking_for_nothing_reads_nothing(make_files):
    assert await make_files().get(reference_info(), []) == []


@pytest.mark.parametrize("other", [{"name": "other"}, {"version": "2"}, {"preprocessing_id": "q"}])
async def test_another_model_version_or_preprocessing_is_another_space(url, make_files, other):
    info = reference_info()
    write_shard(url, info, VALUES)
    assert await make_files().get(info.model_copy(update=other), ["k0"]) == [None]


async def test_files_of_another_width_are_told_and_left_alone(url, make_files):
    info = reference_info()
    write_shard(url, info, VALUES)
    files = make_files()
    assert await files.get(info.model_copy(update={"embedding_width": 5}), ["k0"]) == [None]
    assert files.problems("manifest") == 1
    assert await files.get(info, ["k0"]) == the_bytes("k0")


async def test_shards_that_come_later_are_found_later(url, make_files):
    info, files = reference_info(), make_files(refresh_s=ALWAYS)
    write_shard(url, info, {"k0": VALUES["k0"]}, "000.tar")
    assert await files.get(info, ["k0", "k1"]) == the_bytes("k0", "nobody")
    write_shard(url, info, {"k1": VALUES["k1"]}, "001.tar")

    async def found():
        return await files.get(info, ["k0", "k1"]) == the_bytes("k0", "k1")

    await wait_for(found)


async def test_a_shard_that_is_made_anew_takes_the_place_of_the_old_one(url, make_files):
    info, files = reference_info(), make_files(refresh_s=ALWAYS)
    write_shard(url, info, VALUES)
    assert await files.get(info, ["k0"]) == the_bytes("k0")
    new = {"k0": VALUES["k1"]}
    write_shard(url, info, new)
    assert EmbeddingFolder(url, space_of(info)).data_files() == {packed(info, new, "data/000.tar")[0].file}

    async def replaced():
        return await files.get(info, ["k0", "k1"]) == the_bytes("k1", "nobody")

    await wait_for(replaced)


async def test_between_a_replacement_and_the_next_listing_rows_are_absent_and_never_wrong(url, make_files):
    info, files = reference_info(), make_files(refresh_s=3600)
    write_shard(url, info, VALUES)
    assert await files.get(info, ["k0"]) == the_bytes("k0")
    write_shard(url, info, {"k0": VALUES["k1"]})
    assert await files.get(info, ["k0", "k1"]) == [None, None]
    assert files.problems("read") == 1


async def test_a_file_without_its_manifest_does_not_count(url, make_files):
    info = reference_info()
    manifest, data = packed(info, VALUES, "000.tar")
    EmbeddingFolder(url, space_of(info))._put(manifest.file, data)
    assert await make_files().get(info, ["k0"]) == [None]


async def test_a_manifest_without_its_file_is_told_and_the_other_shards_are_found(url, make_files):
    info = reference_info()
    lost = write_shard(url, info, {"k0": VALUES["k0"]}, "000.tar")
    write_shard(url, info, {"k1": VALUES["k1"]}, "001.tar")
    folder = EmbeddingFolder(url, space_of(info))
    folder._files.rm_file(f"{folder._folder}/{lost.file}")
    files = make_files()
    assert await files.get(info, ["k0", "k1"]) == the_bytes("nobody", "k1")
    assert files.problems("index") == 1


@pytest.mark.parametrize(("keep", "kind"), [(100, "index"), (-1, "checksum")])
async def test_of_a_truncated_file_no_row_is_believed_that_is_not_whole(tmp_path, keep, kind):
    info = reference_info()
    manifest = write_shard(str(tmp_path), info, VALUES)
    file = tmp_path / space_of(info) / manifest.file
    file.write_bytes(file.read_bytes()[:keep])
    files = Counted(str(tmp_path))
    found = await files.get(info, KEYS)
    assert all(value in (None, *the_bytes(key)) for key, value in zip(KEYS, found, strict=True))
    assert found.count(None) == (50 if kind == "index" else 1)
    assert files.problems(kind) == 1
    await files.close()


async def test_a_row_with_a_flipped_bit_counts_as_absent(tmp_path):
    info = reference_info()
    manifest = write_shard(str(tmp_path), info, VALUES)
    files = Counted(str(tmp_path))
    assert None not in await files.get(info, KEYS)
    file = tmp_path / space_of(info) / manifest.file
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert (await files.get(info, KEYS)).count(None) == 1
    assert files.problems("checksum") == 1
    await files.close()


async def test_a_manifest_that_is_none_is_told_and_tried_again(url, make_files):
    info = reference_info()
    folder = EmbeddingFolder(url, space_of(info))
    folder._put("bad.json", b"{")
    files = make_files(refresh_s=ALWAYS)

    async def told_twice():
        assert await files.get(info, ["k0"]) == [None]
        return files.problems("manifest") >= 2

    await wait_for(told_twice)


async def test_a_folder_that_cannot_be_listed_is_told_and_counts_as_empty(tmp_path):
    info = reference_info()
    (tmp_path / "store").write_text("a file where a folder should be")
    files = Counted(str(tmp_path / "store" / "deeper"))
    assert await files.get(info, ["a"]) == [None]
    assert files.problems("listing") == 1
    await files.close()


async def test_reads_that_hang_are_given_up_and_the_files_are_left_alone_for_a_while(tmp_path, monkeypatch):
    info, let_go = reference_info(), threading.Event()
    write_shard(str(tmp_path), info, VALUES)
    files = Counted(str(tmp_path), timeout_s=0.2)
    assert await files.get(info, ["k0"]) == the_bytes("k0")
    monkeypatch.setattr(EmbeddingFolder, "ranges", lambda *_: let_go.wait(30))
    async with asyncio.timeout(20):  # less than the file system hangs
        assert await files.get(info, ["k0"]) == [None]
        assert await files.get(info, ["k0"]) == [None]
        await files.close()
    assert files.problems("timeout") == 1
    let_go.set()


async def test_a_first_listing_that_hangs_holds_nobody_up_for_long(tmp_path, monkeypatch):
    let_go = threading.Event()
    monkeypatch.setattr(embedding_files, "FIRST_LISTING_S", 0.1)
    monkeypatch.setattr(EmbeddingFolder, "stamps", lambda _: let_go.wait(30) and {})
    files = Counted(str(tmp_path))
    async with asyncio.timeout(20):  # less than the file system hangs
        assert await files.get(reference_info(), ["k0"]) == [None]
    let_go.set()
    await files.close()


def test_a_url_that_nothing_reads_is_refused_with_its_name():
    with pytest.raises(ValueError, match="'nonsense://x' is no path or URL that can be read here"):
        EmbeddingFiles("nonsense://x", EmbeddingFileMetrics(CollectorRegistry()))


@settings(max_examples=30)
@given(
    shards=st.lists(st.dictionaries(st.integers(0, 400), st.integers(0, 2**16 - 1), max_size=200), max_size=4),
    asked=st.lists(st.integers(0, 400), max_size=100),
)
def test_what_is_found_is_what_a_dictionary_holds(tmp_path_factory, shards, asked):
    """Whatever rows lie near to each other, and whichever of several files with the same key answers."""
    url, info = str(tmp_path_factory.mktemp("shards")), reference_info(embedding_width=2048)
    held: dict[str, set[bytes]] = {}
    for number, shard in enumerate(shards):
        values = {f"k{key}": embeddings_of("x", width=2048, seed=seed)[0] for key, seed in shard.items()}
        write_shard(url, info, values, f"{number}.tar")
        for key, value in values.items():
            held.setdefault(key, set()).add(value.tobytes())

    async def look_up():
        files = Counted(url)
        found = await files.get(info, [f"k{key}" for key in asked])
        await files.close()
        return found

    for key, value in zip(asked, asyncio.run(look_up()), strict=True):
        assert value in held.get(f"k{key}", {None})


def test_two_writers_of_one_shard_leave_one_of_both_whole(tmp_path):
    info, folder = reference_info(), EmbeddingFolder(str(tmp_path), "space")
    made = [packed(info, {"a": VALUES[key]}, "000.tar") for key in ("k0", "k1")]

    def write(manifest, data):
        for _ in range(30):
            folder.write(manifest, data)

    threads = [threading.Thread(target=write, args=pair) for pair in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (name,) = folder.stamps()
    manifest = folder.manifest(name)
    assert manifest in [first for first, _ in made]
    assert not [path for path in Path(tmp_path, "space").iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
async def test_a_row_that_is_not_finite_counts_as_absent(url, make_files, broken):
    info = reference_info()
    row = VALUES["k1"].copy()
    row[1, 2] = broken
    write_shard(url, info, {"k0": VALUES["k0"], "k1": row})
    files = make_files()
    assert await files.get(info, ["k0", "k1"]) == [*the_bytes("k0"), None]
    assert files.problems("not_finite") == 1
