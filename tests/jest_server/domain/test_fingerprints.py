from __future__ import annotations

import numpy as np
import pytest

from jest_server.domain.fingerprints import fingerprint_of, least_cosine

WIDTH = 64
ROWS = np.random.default_rng(0).standard_normal((4, 2, WIDTH)).astype(np.float32)


def cosine_to(other):
    return least_cosine(fingerprint_of(ROWS), fingerprint_of(other), width=WIDTH)


def test_the_same_answers_have_cosine_1():
    assert cosine_to(ROWS) == pytest.approx(1, abs=1e-12)


def test_last_bits_hardly_turn_a_row():
    noise = np.random.default_rng(1).standard_normal(ROWS.shape).astype(np.float32)
    assert cosine_to(ROWS + 1e-3 * noise) > 0.9999


def test_the_row_that_differs_most_counts():
    turned = ROWS.copy()
    turned[2, 1] = np.roll(turned[2, 1], 1)
    expected = ROWS[2, 1] @ turned[2, 1] / (ROWS[2, 1] @ ROWS[2, 1])
    assert cosine_to(turned) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("other", [ROWS[:3], ROWS[:, :, :32], ROWS[:0]])
def test_answers_of_another_size_are_never_the_same(other):
    assert cosine_to(other) == -1


def test_a_row_without_direction_is_like_no_other():
    zeros = ROWS.copy()
    zeros[0, 0] = 0
    assert cosine_to(zeros) == 0
