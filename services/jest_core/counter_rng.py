"""Randomness as a function: Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3").

A draw depends on its seed and its address alone, so any replica can repeat any draw, in any order, on any
device, and nobody's generator state is read or changed.
"""

from hashlib import blake2b
from typing import TypeAlias

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_SEED_LIMIT = 2**64

Words: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


def selection_seed(job_seed: int, step: int) -> int:
    """The 64-bit seed of one step's selection: BLAKE2b-64 of the step, keyed by the job's seed.

    The key is the job seed in eight little-endian bytes, the message the step likewise, the digest an
    unsigned little-endian number: any language with BLAKE2b can repeat it. Nothing else counts, so a
    resumed run draws what the uninterrupted one would have drawn.

    Raises:
        ValueError: the job seed or the step does not fit in 64 unsigned bits.
    """
    require_seed("job_seed", job_seed)
    require_seed("step", step)
    digest = blake2b(step.to_bytes(8, "little"), digest_size=8, key=job_seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def require_seed(name: str, seed: int) -> None:
    """Raise a ValueError unless `seed` is an integer that fits in 64 unsigned bits."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _SEED_LIMIT:
        raise ValueError(f"{name} ({seed!r}) must be an integer from 0 to 2**64 - 1")


def gumbel_noise(seed: int, rows: Tensor, chunk: int) -> Tensor:
    """Standard Gumbel noise, float64, one value for each of `rows` (int64) at the given chunk."""
    return -torch.log(-torch.log(uniform(seed, rows, chunk)))


def uniform(seed: int, rows: Tensor, chunk: int) -> Tensor:
    """Uniform float64 in the open interval (0, 1), one value for each of `rows` at the given chunk.

    The counter is (row, chunk, 0, 0). A value is (k + 1/2) / 2**52 for a 52-bit k: 53 significant bits, all
    exact. With a 53-bit k the largest value would round up to 1, whose Gumbel noise is infinite.
    """
    zero = torch.zeros_like(rows)
    first, second, _, _ = philox_4x32((rows, torch.full_like(rows, chunk), zero, zero), seed)
    k = (first << 20) | (second >> 12)
    return (k.double() + 0.5) * 2.0**-52


def philox_4x32(counter: Words, seed: int) -> Words:
    """Ten rounds of Philox on 32-bit words held in int64 tensors; the seed's low word is the first key word."""
    x0, x1, x2, x3 = counter
    key0, key1 = seed & _WORD, seed >> 32
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(x0, _MULTIPLIERS[0])
        high1, low1 = _multiply(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = (
            high1.bitwise_xor_(x1).bitwise_xor_(key0),
            low1,
            high0.bitwise_xor_(x3).bitwise_xor_(key1),
            low0,
        )
        key0 = (key0 + _KEY_INCREMENTS[0]) & _WORD
        key1 = (key1 + _KEY_INCREMENTS[1]) & _WORD
    return x0, x1, x2, x3


def _multiply(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    # A 64-bit product may wrap into the sign bit; its bits are right all the same, and the masks read them.
    product = words * factor
    return (product >> 32).bitwise_and_(_WORD), product.bitwise_and_(_WORD)
