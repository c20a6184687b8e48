"""Finding rows of many files, against a dictionary."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jest_server.stores.embedding_files.format import digests_of
from jest_server.stores.embedding_files.index import DigestIndex


def index_part(keys, first=0):
    """Digests in their order, as files have them, and checksums that count on from ``first``."""
    digests = sorted(row.tobytes() for row in digests_of(list(keys)))
    rows = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
    return rows, np.arange(first, first + len(rows), dtype=np.uint32)


def digest_of(key):
    return digests_of([key]).tobytes()


names = st.integers(0, 60).map(str)


@given(rounds=st.lists(st.lists(st.sets(names, max_size=20), max_size=4), max_size=4), data=st.data())
def test_every_row_of_a_living_file_is_found_and_no_other(rounds, data):
    """Whatever was added in whatever rounds, and whichever files died since."""
    index, files = DigestIndex(), []
    for shards in rounds:
        added = {}
        for keys in shards:
            added[len(files)] = index_part(keys, 1000 * len(files))
            files.append(sorted(keys, key=digest_of))
        index = index.with_files(added, np.ones(len(files), bool))
    dead = data.draw(st.sets(st.integers(0, max(0, len(files) - 1))))
    alive = np.array([number not in dead for number in range(len(files))], bool)
    asked = data.draw(st.lists(names))
    found = index.find(digests_of(asked), alive)
    for position, key in enumerate(asked):
        homes = {(number, keys.index(key)) for number, keys in enumerate(files) if alive[number] and key in keys}
        if homes:
            home = (found.file[position], found.row[position])
            assert home in homes
            assert found.checksum[position] == home[1] + 1000 * home[0]
        else:
            assert found.file[position] == -1


def test_adding_files_one_by_one_leaves_few_runs():
    index = DigestIndex()
    for number in range(200):
        index = index.with_files({number: index_part(f"{number}-{i}" for i in range(10))}, np.ones(number + 1, bool))
    assert len(index) == 2000
    assert len(index.runs) < 12


def test_digests_that_share_their_first_half_are_told_apart():
    digests = np.zeros((5, 16), np.uint8)
    digests[:, 15] = [0, 1, 2, 3, 4]
    index = DigestIndex().with_files({0: (digests, np.zeros(5, np.uint32))}, np.ones(1, bool))
    assert index.find(digests, np.ones(1, bool)).row.tolist() == [0, 1, 2, 3, 4]
    digests[:, 15] = 9
    assert index.find(digests, np.ones(1, bool)).file.tolist() == [-1] * 5


def test_rows_of_dead_files_go_when_runs_are_merged():
    index = DigestIndex()
    for number in range(2):
        index = index.with_files(
            {number: index_part(f"{number}-{i}" for i in range(10))}, np.array([number == 0, True])
        )
    assert len(index) == 10
