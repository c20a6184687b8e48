"""Fingerprints of reference models: their answers to fixed probe examples, as float16 rows, compared by direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_F16 = np.dtype("<f2")


def fingerprint_of(embeddings: npt.NDArray[np.float32]) -> bytes:
    """Return the fingerprint of these embeddings of the probe examples, `[n, 2, D]`."""
    return embeddings.astype(_F16).tobytes()


def least_cosine(first: bytes, second: bytes, *, width: int) -> float:
    """Return the cosine between the two rows that differ most; -1 if the fingerprints have different sizes.

    Batching and kinds of GPUs change last bits, which hardly turn a row. Other weights turn every row.
    """
    if len(first) != len(second) or not first or len(first) % (width * _F16.itemsize):
        return -1.0
    rows, others = (np.frombuffer(each, _F16).reshape(-1, width).astype(np.float64) for each in (first, second))
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    return float(((rows * others).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)).min())
