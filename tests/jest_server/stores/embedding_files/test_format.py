"""What lies in a file of embeddings, and what is refused as one."""

from __future__ import annotations

import json
from hashlib import blake2b

import numpy as np
import pytest
import safetensors.numpy

from jest_server.stores.embedding_files.format import (
    EmbeddingFileError,
    checksum_of,
    digests_of,
    halves,
    index_of,
    read_manifest,
    shard_of,
)
from support.embedding_shards import embeddings_of, packed, reference_info

KEYS = [f"k{i}" for i in range(100)]
INFO = reference_info()


@pytest.fixture
def shard():
    return packed(INFO, dict(zip(KEYS, embeddings_of(KEYS), strict=True)), "s3://b/000.tar")


def test_a_file_is_safetensors_with_rows_in_the_order_of_their_keys_digests(shard):
    manifest, data = shard
    tensors = safetensors.numpy.load(data)
    digests = [row.tobytes() for row in tensors["digests"]]
    assert digests == sorted(blake2b(key.encode(), digest_size=16).digest() for key in KEYS)
    values = dict(zip(KEYS, embeddings_of(KEYS), strict=True))
    by_digest = {blake2b(key.encode(), digest_size=16).digest(): value for key, value in values.items()}
    assert tensors["embeddings"].dtype == np.float16
    assert all((tensors["embeddings"][i] == by_digest[digest]).all() for i, digest in enumerate(digests))
    assert (manifest.smallest_digest, manifest.largest_digest) == (digests[0].hex(), digests[-1].hex())
    assert (manifest.rows, manifest.bytes) == (100, len(data))


def test_the_index_comes_before_the_embeddings_and_can_be_read_alone(shard):
    manifest, data = shard
    digests, checksums = index_of(data[: manifest.layout.index_bytes], manifest, "m.json")
    tensors = safetensors.numpy.load(data)
    assert (digests == tensors["digests"]).all()
    assert (checksums == tensors["checksums"]).all()


def test_a_shard_without_rows_is_a_file_too():
    manifest, data = packed(INFO, {}, "s3://b/000.tar")
    digests, _ = index_of(data, manifest, "m.json")
    assert (len(digests), manifest.rows, manifest.smallest_digest) == (0, 0, "")


def test_the_same_rows_in_another_order_make_the_same_file(shard):
    again = dict(reversed(list(zip(KEYS, embeddings_of(KEYS), strict=True))))
    assert packed(INFO, again, "s3://b/000.tar") == shard


def test_other_rows_make_a_file_of_another_name(shard):
    other = dict(zip(KEYS, embeddings_of(KEYS, seed=1), strict=True))
    assert packed(INFO, other, "s3://b/000.tar")[0].file != shard[0].file


def test_input_shards_of_one_name_in_two_folders_are_kept_apart():
    assert shard_of("s3://a/000.tar") != shard_of("s3://b/000.tar")


def test_halves_of_digests_sort_as_their_bytes_do():
    digests = digests_of([str(i) for i in range(1000)])
    high, low = halves(digests)
    by_number = sorted(zip(high.tolist(), low.tolist(), (row.tobytes() for row in digests), strict=True))
    assert [row for _, _, row in by_number] == sorted(row.tobytes() for row in digests)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rows", 99, "bytes is .*, expected .* for its rows"),
        ("index_checksum", "0" * 32, "index checksum is [0-9a-f]{32}, expected 0{32}"),
        ("smallest_digest", "00", "smallest_digest and largest_digest are 00 and"),
    ],
)
def test_a_manifest_that_does_not_fit_the_file_is_refused(shard, field, value, message):
    manifest, data = shard
    wrong = manifest.model_copy(update={field: value})
    with pytest.raises(EmbeddingFileError, match=message):
        index_of(data[: manifest.layout.index_bytes], wrong, "m.json")


@pytest.mark.parametrize("position", [0, 30, 500, 1700, 2000])
def test_a_flipped_bit_before_the_embeddings_is_found(shard, position):
    manifest, data = shard
    index = bytearray(data[: manifest.layout.index_bytes])
    index[position] ^= 1
    with pytest.raises(EmbeddingFileError, match="index checksum"):
        index_of(bytes(index), manifest, "m.json")


def test_a_truncated_index_is_refused(shard):
    manifest, data = shard
    with pytest.raises(EmbeddingFileError, match=r"ends after 100 bytes, expected at least \d+"):
        index_of(data[:100], manifest, "m.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is '2'.*1"),
        ({"rows": -1}, "rows is '-1'.*greater than or equal to 0"),
        ({"file": "../../etc/passwd.safetensors"}, "file is '../../etc/passwd.safetensors'"),
        ({"checksum": "zz"}, "checksum is 'zz'"),
        ({"surprise": 1}, "surprise is '1'.*not permitted"),
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused_by_name(shard, change, message):
    text = json.dumps(json.loads(shard[0].model_dump_json()) | change)
    with pytest.raises(EmbeddingFileError, match=f"m.json: {message}"):
        read_manifest(text.encode(), "m.json")


def test_a_manifest_that_was_cut_off_is_refused(shard):
    with pytest.raises(EmbeddingFileError, match=r"content is .*Invalid JSON"):
        read_manifest(shard[0].model_dump_json().encode()[:50], "m.json")


def test_a_manifest_comes_back_as_it_was_written(shard):
    assert read_manifest(shard[0].model_dump_json().encode(), "m.json") == shard[0]


def test_rows_out_of_order_are_refused_though_their_checksum_is_right(shard):
    manifest, data = shard
    start, index = len(manifest.layout.header), bytearray(data[: manifest.layout.index_bytes])
    index[start : start + 16], index[start + 16 : start + 32] = (
        index[start + 16 : start + 32],
        index[start : start + 16],
    )
    wrong = manifest.model_copy(update={"index_checksum": checksum_of(bytes(index))})
    with pytest.raises(EmbeddingFileError, match="digests are not in order"):
        index_of(bytes(index), wrong, "m.json")
