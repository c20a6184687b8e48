import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import jest_core_oracle as oracle
from jest_core import selection_seed
from jest_core.counter_rng import gumbel_noise, philox_4x32, uniform

WORD = st.integers(0, 2**32 - 1)
ONES = 2**32 - 1

# Random123, tests/kat_vectors, "philox4x32 10".
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def run_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    a, b, c, d = (torch.tensor([word]) for word in counter)
    return tuple(int(word) for word in philox_4x32((a, b, c, d), key[0] | key[1] << 32))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, answer):
    assert run_philox(counter, key) == answer


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_oracle_gives_the_published_known_answers(counter, key, answer):
    assert oracle.philox_4x32_10(counter, key) == answer


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_philox_equals_the_oracle(counter, key):
    assert run_philox(counter, key) == oracle.philox_4x32_10(counter, key)


@given(seed=st.integers(0, 2**64 - 1), row=st.integers(0, 10**6), chunk=st.integers(0, 1000))
def test_a_uniform_value_is_made_of_the_first_52_bits_at_its_address(seed, row, chunk):
    first, second, _, _ = oracle.philox_4x32_10((row, chunk, 0, 0), (seed % 2**32, seed >> 32))
    bits = first * 2**20 + second // 2**12
    assert float(uniform(seed, torch.tensor([row]), chunk)) == (2 * bits + 1) / 2**53


@pytest.mark.parametrize("word", [0, ONES])
def test_uniform_values_stay_strictly_inside_the_interval(monkeypatch, word):
    rows = torch.arange(3)
    monkeypatch.setattr("jest_core.counter_rng.philox_4x32", lambda *_: (torch.full_like(rows, word),) * 4)
    values = uniform(0, rows, 0)
    assert bool((values > 0).all())
    assert bool((values < 1).all())
    assert bool(gumbel_noise(0, rows, 0).isfinite().all())


def test_noise_follows_the_gumbel_distribution():
    noise = gumbel_noise(20240611, torch.arange(100_000), 3)
    assert noise.dtype == torch.float64
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 0.01


def test_noise_at_an_address_does_not_depend_on_what_else_is_drawn():
    everything = gumbel_noise(5, torch.arange(1000), 2)
    some = torch.tensor([999, 3, 500])
    assert torch.equal(gumbel_noise(5, some, 2), everything[some])


def test_noise_differs_between_seeds_rows_and_chunks():
    rows = torch.arange(100)
    draws = torch.cat([gumbel_noise(seed, rows, chunk) for seed in (0, 1, 2**32, 2**63) for chunk in (0, 1)])
    assert len(torch.unique(draws)) == len(draws)


def test_the_selection_seed_is_keyed_blake2b_of_the_step():
    digest = hashlib.blake2b((7).to_bytes(8, "little"), key=(42).to_bytes(8, "little"), digest_size=8).digest()
    assert selection_seed(42, 7) == int.from_bytes(digest, "little")


def test_selection_seeds_are_pinned_for_all_time():
    assert selection_seed(0, 0) == 2271152774672154522
    assert selection_seed(2**64 - 1, 1) == 10775863016550808411


def test_selection_seeds_differ_between_jobs_and_between_steps():
    seeds = {selection_seed(job, step) for job in range(20) for step in range(50)}
    assert len(seeds) == 1000


@pytest.mark.parametrize("job_seed", [-1, 2**64, 1.0, True, "7"])
def test_a_job_seed_outside_64_bits_is_an_error(job_seed):
    with pytest.raises(ValueError, match=r"job_seed \(.*\) must be an integer from 0 to 2\*\*64 - 1"):
        selection_seed(job_seed, 0)


@pytest.mark.parametrize("step", [-1, 2**64, 1.0, True, "7"])
def test_a_step_outside_64_bits_is_an_error(step):
    with pytest.raises(ValueError, match=r"step \(.*\) must be an integer from 0 to 2\*\*64 - 1"):
        selection_seed(0, step)
