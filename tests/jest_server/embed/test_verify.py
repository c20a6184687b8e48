"""Reading all files again finds whatever is wrong with them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jest_server.embed.verify import verify
from jest_server.stores.embedding_files.folder import EmbeddingFolder
from jest_server.stores.embedding_files.format import checksum_of, space_of
from support.embedding_shards import embeddings_of, packed, reference_info, write_shard

INFO = reference_info()
VALUES = {f"k{i}": row for i, row in enumerate(embeddings_of(range(20)))}


@pytest.fixture
def written(tmp_path):
    """The output, and the paths of one of its two shards: manifest and file."""
    manifest = write_shard(str(tmp_path), INFO, VALUES, "000.tar")
    write_shard(str(tmp_path), INFO, VALUES, "001.tar")
    folder = tmp_path / space_of(INFO)
    return tmp_path, folder / f"{manifest.file.split('.')[0]}.json", folder / manifest.file


def only_problem(output):
    verified = verify(str(output))
    (problem,) = verified.problems
    assert (verified.files, verified.rows) == (1, 20)
    return problem


def test_files_that_are_right_are_counted(written):
    verified = verify(str(written[0]))
    assert (verified.files, verified.rows, verified.problems, verified.unnamed) == (2, 40, [], [])


@pytest.mark.parametrize("position", [0, 20, 400, -100, -1])
def test_a_flipped_bit_is_found_wherever_it_is(written, position):
    output, _, file = written
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)
    problem = only_problem(output)
    assert file.name in problem
    assert "checksum is" in problem


def test_a_truncated_file_is_found(written):
    output, _, file = written
    file.write_bytes(file.read_bytes()[:-1])
    assert f"has {file.stat().st_size} bytes, expected {file.stat().st_size + 1}" in only_problem(output)


def test_a_lost_file_is_found(written):
    output, manifest, file = written
    file.unlink()
    assert f"{manifest.name}: file {file.name} cannot be read: FileNotFoundError" in only_problem(output)


def test_a_manifest_with_another_count_is_found(written):
    output, manifest, _ = written
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"rows": 19}))
    assert f"{manifest.name}: bytes is" in only_problem(output)


def test_a_damaged_manifest_is_found(written):
    output, manifest, _ = written
    manifest.write_text(manifest.read_text()[:40])
    assert f"{manifest.name}: content is" in only_problem(output)


def test_embeddings_that_are_not_finite_are_found(tmp_path):
    write_shard(str(tmp_path), INFO, VALUES, "001.tar")
    write_shard(str(tmp_path), INFO, VALUES | {"k3": np.full((2, 4), np.nan)}, "000.tar")
    assert "1 rows hold NaN or infinity, expected finite ones" in only_problem(tmp_path)


def test_a_row_with_a_wrong_checksum_of_its_own_is_found(tmp_path):
    write_shard(str(tmp_path), INFO, VALUES, "001.tar")
    manifest, data = packed(INFO, VALUES, "000.tar")
    wrong = bytearray(data)
    wrong[manifest.layout.index_bytes] ^= 1
    right = manifest.model_copy(update={"checksum": checksum_of(bytes(wrong))})
    EmbeddingFolder(str(tmp_path), space_of(INFO)).write(right, bytes(wrong))
    assert "1 rows have wrong checksums, first row 0" in only_problem(tmp_path)


def test_files_that_no_manifest_names_are_told_and_are_no_problem(written):
    output, manifest, file = written
    manifest.unlink()
    verified = verify(str(output))
    assert (verified.problems, verified.unnamed) == ([], [f"{space_of(INFO)}/{file.name}"])


def test_where_there_is_nothing_that_is_the_problem(tmp_path):
    assert verify(str(tmp_path / "nothing")).problems == [f"{tmp_path}/nothing: has no embeddings in it"]
