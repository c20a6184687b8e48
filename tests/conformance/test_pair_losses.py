"""Pair losses come in tiles that cover each rank's rows and every column once, in row-major order."""

import grpc
import numpy as np
import pytest

from conformance.speaker import TIMEOUT_S, features, fresh_keys, refused
from jest_proto.v1 import jobs_pb2, selection_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
ROWS = 16
POLICY = jobs_pb2.SelectionPolicy(
    sub_batch_size=4, num_chunks=2, loss=jobs_pb2.LOSS_PAIRWISE, scoring=jobs_pb2.SCORING_HARD_LEARNER
)


@pytest.fixture
def ready(speaker):
    """Name of a job with a super-batch of one rank that only lacks its learner outputs."""
    job = speaker.create_job(policy=POLICY, reference_model="")
    speaker.submit(job.spec.name, "sb", fresh_keys(ROWS))
    return job.spec.name


def matrix(seed=0, rows=ROWS, columns=ROWS, dtype=np.float32):
    return np.random.default_rng(seed).random((rows, columns)).astype(dtype)


def tiled(losses, *, rows=5, columns=7):
    """Cuts losses into tiles of at most so many rows and columns."""
    return {
        (row, column): losses[row : row + rows, column : column + columns]
        for row in range(0, losses.shape[0], rows)
        for column in range(0, losses.shape[1], columns)
    }


def test_however_the_matrix_is_cut_the_choice_is_the_same(speaker):
    positions = []
    for cut in ({"rows": 16, "columns": 16}, {"rows": 1, "columns": 16}, {"rows": 5, "columns": 7}):
        job = speaker.create_job(policy=POLICY, reference_model="")
        speaker.submit(job.spec.name, "sb", [f"pair-{row}" for row in range(ROWS)])
        positions.append(speaker.select_pairs(job.spec.name, "sb", tiled(matrix(), **cut)).positions)
    assert positions[0] == positions[1] == positions[2]
    assert len(set(positions[0])) == 4


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_hardest_rows_are_chosen_given_the_rows_chosen_before(speaker, dtype):
    policy = jobs_pb2.SelectionPolicy()
    policy.CopyFrom(POLICY)
    policy.sampler = jobs_pb2.SAMPLER_TOP_K
    job = speaker.create_job(policy=policy, reference_model="")
    speaker.submit(job.spec.name, "sb", fresh_keys(ROWS))
    losses = matrix(3, dtype=dtype)
    answer = speaker.select_pairs(job.spec.name, "sb", tiled(losses))
    exact = losses.astype(np.float64)
    first = np.argsort(-exact.diagonal())[:2].tolist()
    given = exact.diagonal() + sum(exact[:, k] + exact[k, :] for k in first)
    given[first] = -np.inf
    assert list(answer.positions) == first + np.argsort(-given)[:2].tolist()


def test_the_reference_models_losses_count_beside_the_learners(speaker):
    policy = jobs_pb2.SelectionPolicy(sub_batch_size=4, num_chunks=2, loss=jobs_pb2.LOSS_PAIRWISE)
    job, keys = speaker.create_job(policy=policy), fresh_keys(ROWS)
    missing = list(speaker.submit(job.spec.name, "sb", keys).missing_positions)
    assert missing == list(range(ROWS))
    speaker.upload(job.spec.name, "sb", missing, features(job, keys))
    answer = speaker.select_pairs(job.spec.name, "sb", tiled(matrix()))
    assert (len(answer.positions), answer.reference_inferences) == (4, ROWS)


@pytest.fixture
def two_ranks(speaker):
    """Name of a job of two ranks, of which the first has submitted six rows and the second ten."""
    job = speaker.create_job(policy=POLICY, reference_model="", world_size=2)
    for rank, rows in enumerate((6, 10)):
        speaker.submit(job.spec.name, "sb", [f"two-{rank}-{row}" for row in range(rows)], rank=rank, world_size=2)
    return job.spec.name


def select_both(speaker, name, *, first=0, **options):
    losses = matrix()
    parts = {0: losses[:6], 1: losses[6:]}
    return {
        rank: speaker.select_pairs(name, "sb", tiled(parts[rank]), rank=rank, world_size=2, wait=False, **options)
        for rank in (first, 1 - first)
    }


def bring_and_leave(speaker, name):
    """The first rank brings its rows and does not wait for the second: they are there from now on."""
    part = tiled(matrix()[:6])
    refusal = refused(speaker.select_pairs, name, "sb", part, rank=0, world_size=2, timeout_s=1.5)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "WAITING_FOR_RANKS")


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_bring_their_rows_of_one_matrix_in_any_order(speaker, two_ranks, first):
    calls = select_both(speaker, two_ranks, first=first)
    answers = {rank: call.result() for rank, call in calls.items()}
    assert [len(answers[rank].positions) for rank in range(2)] == [2, 2]
    assert max(answers[0].positions) < 6
    assert answers[0].perplexity == answers[1].perplexity
    again = {rank: call.result() for rank, call in select_both(speaker, two_ranks).items()}
    assert again == answers


def test_two_calls_of_one_rank_at_once_bring_its_rows_once(speaker, two_ranks):
    part = tiled(matrix()[:6])
    twice = [speaker.select_pairs(two_ranks, "sb", part, rank=0, world_size=2, wait=False) for _ in range(2)]
    other = speaker.select_pairs(two_ranks, "sb", tiled(matrix()[6:]), rank=1, world_size=2)
    assert twice[0].result() == twice[1].result()
    assert other.sub_batch_size == 4


def test_a_rank_that_comes_again_with_other_losses_before_the_decision_gets_one(speaker, two_ranks):
    bring_and_leave(speaker, two_ranks)
    again = speaker.select_pairs(two_ranks, "sb", tiled(matrix(9)[:6]), rank=0, world_size=2, wait=False)
    answers = select_both(speaker, two_ranks)
    assert again.result().positions == answers[0].result().positions
    assert [len(call.result().positions) for call in answers.values()] == [2, 2]


def test_nothing_is_received_before_every_rank_has_submitted(speaker):
    job = speaker.create_job(policy=POLICY, reference_model="", world_size=2)
    name = job.spec.name
    speaker.submit(name, "sb", fresh_keys(6), rank=0, world_size=2)
    part = tiled(matrix()[:6])
    refusal = refused(speaker.select_pairs, name, "sb", part, rank=0, world_size=2, timeout_s=1.5)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "WAITING_FOR_RANKS")
    assert "ranks [1] have not submitted" in refusal.message
    early = speaker.select_pairs(name, "sb", part, rank=0, world_size=2, wait=False)
    speaker.submit(name, "sb", fresh_keys(10), rank=1, world_size=2)
    speaker.select_pairs(name, "sb", tiled(matrix()[6:]), rank=1, world_size=2)
    assert len(early.result().positions) == 2


def test_pair_losses_of_a_super_batch_that_was_never_submitted_are_refused(speaker, ready):
    refusal = refused(speaker.select_pairs, ready, "never", tiled(matrix()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "SUPER_BATCH_UNKNOWN")


@pytest.mark.parametrize(
    ("tiles", "field", "says"),
    [
        ({(0, 0): matrix(rows=15)}, "pair_losses.tiles", "cover 240 elements, expected 256"),
        ({(0, 0): matrix(columns=15)}, "pair_losses.tiles", "cover 240 elements, expected 256"),
        ({(0, 0): matrix(rows=17)}, "pair_losses.tiles[0]", "rows 0 to 16"),
        ({(0, 0): matrix(columns=17)}, "pair_losses.tiles[0]", "columns 0 to 16"),
        ({(0, 1): matrix()}, "pair_losses.tiles[0]", "expected it inside [16, 16]"),
        ({(0, 0): matrix(), (8, 8): matrix(rows=2, columns=2)}, "pair_losses.tiles[1]", "start at row 16, column 0"),
        (
            {(0, 0): matrix(rows=9), (8, 0): matrix(rows=8)},
            "pair_losses.tiles[1]",
            "covers rows 8 to 15, columns 0 to 15, expected it to start at row 9, column 0: tiles come in row-major",
        ),
        (
            dict(reversed(tiled(matrix(), rows=8, columns=16).items())),
            "pair_losses.tiles[0]",
            "covers rows 8 to 15, columns 0 to 15, expected it to start at row 0, column 0: tiles come in row-major",
        ),
        (
            dict(reversed(tiled(matrix(), rows=16, columns=8).items())),
            "pair_losses.tiles[0]",
            "covers rows 0 to 15, columns 8 to 15, expected it to start at row 0, column 0: tiles come in row-major",
        ),
        (
            {(0, 0): matrix(columns=8), (0, 8): matrix(rows=8, columns=8), (8, 8): matrix(rows=8, columns=8)},
            "pair_losses.tiles[1]",
            "covers rows 0 to 7, columns 8 to 15, expected 16 rows",
        ),
        ({}, "pair_losses.tiles", "0 tiles for 0 tensors"),
        ({(0, 0): matrix(dtype=np.int32)}, "tensors[tile-0].datatype", "INT32"),
        ({(0, 0): matrix()[0]}, "tensors[tile-0].shape", "expected [rows, columns]"),
        ({(0, 0): matrix(columns=0)}, "tensors[tile-0].shape", "expected [rows, columns]"),
        (
            {(0, 0): matrix(rows=8), (8, 0): matrix(rows=8, dtype=np.float16)},
            "tensors[tile-1].datatype",
            "expected the first tile's FP32",
        ),
    ],
)
def test_tiles_that_do_not_cover_the_matrix_once_and_in_order_are_refused_by_name(speaker, ready, tiles, field, says):
    refusal = refused(speaker.select_pairs, ready, "sb", tiles)
    assert (refusal.code, refusal.fields) == (INVALID, [field])
    assert says in refusal.message
    assert len(speaker.select_pairs(ready, "sb", tiled(matrix())).positions) == 4


def without_a_place(messages):
    del messages[0].header.pair_losses.tiles[0]
    return messages


def with_equal_names(messages):
    for spec in messages[0].header.tensors:
        spec.name = "tile"
    return messages


def with_a_huge_tile(messages):
    messages[0].header.tensors[0].byte_length = (16 << 20) + 4
    return messages


@pytest.mark.parametrize(
    ("spoil", "field", "says"),
    [
        (without_a_place, "pair_losses.tiles", "11 tiles for 12 tensors"),
        (with_equal_names, "tensors[tile]", "announced twice"),
        (with_a_huge_tile, "tensors[tile-0].byte_length", "the limit for a tile is 16777216"),
        (lambda messages: messages[:-1], "tensors[tile-11]", "ended after 0 bytes"),
        (lambda messages: [*messages[:2], *messages[3:]], "chunk", "expected tensor 1"),
    ],
)
def test_a_broken_announcement_or_stream_is_refused(speaker, ready, spoil, field, says):
    refusal = refused(speaker.select_pairs, ready, "sb", tiled(matrix()), spoil=spoil)
    assert (refusal.code, refusal.fields) == (INVALID, [field])
    assert says in refusal.message
    assert len(speaker.select_pairs(ready, "sb", tiled(matrix())).positions) == 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_no_number_is_refused_with_its_tile_row_and_column(speaker, ready, value):
    losses = matrix()
    losses[6, 9] = value
    refusal = refused(speaker.select_pairs, ready, "sb", tiled(losses))
    assert (refusal.code, refusal.fields) == (INVALID, ["tensors[tile-4]"])
    assert "row 1, column 2" in refusal.message
    assert len(speaker.select_pairs(ready, "sb", tiled(matrix())).positions) == 4


def test_a_bit_that_changed_on_the_way_is_noticed(speaker, ready):
    def spoil(messages):
        messages[0].header.tensors[3].xxh3_64 ^= 1
        return messages

    refusal = refused(speaker.select_pairs, ready, "sb", tiled(matrix()), spoil=spoil)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "CHECKSUM_MISMATCH")
    assert "tile-3" in refusal.message


def test_a_matrix_over_the_limit_is_refused_before_anything_is_sent(speaker):
    limit = speaker.selection.GetServerInfo(selection_pb2.GetServerInfoRequest(), timeout=TIMEOUT_S).max_pair_loss_bytes
    rows = int((limit / 4) ** 0.5) + 1
    job = speaker.create_job(policy=POLICY, reference_model="")
    speaker.submit(job.spec.name, "sb", [str(row) for row in range(rows)])
    small = {(0, 0): matrix()}
    refusal = refused(speaker.select_pairs, job.spec.name, "sb", small, spoil=lambda messages: messages[:1])
    assert (refusal.code, refusal.reason, refusal.fields) == (INVALID, "TOO_LARGE", ["pair_losses"])
    assert str(limit) in refusal.message


def test_ranks_whose_losses_have_other_datatypes_are_refused(speaker, two_ranks):
    bring_and_leave(speaker, two_ranks)
    half = tiled(matrix()[6:].astype(np.float16))
    refusal = refused(speaker.select_pairs, two_ranks, "sb", half, rank=1, world_size=2)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "SUPER_BATCH_CONFLICT")
    assert "FP16 of 16 rows, another in FP32 of 16" in refusal.message
    assert [len(call.result().positions) for call in select_both(speaker, two_ranks).values()] == [2, 2]
