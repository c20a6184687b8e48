"""The probe examples of fingerprints: fixed rows within the inputs' types, the same in every process and release."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from jest_server.domain.errors import ReferenceModelError
from jest_server.reference.arrays import neutral_example
from jest_wire.tensors import DATATYPES

if TYPE_CHECKING:
    from jest_server.domain.ports import ReferenceModel
    from jest_server.domain.references import ReferenceInfo, ReferenceInput

PROBES: Final = 4
OPEN_LENGTH: Final = 8
"""Of dimensions that the model leaves open."""
LARGEST_TOKEN: Final = 31
"""Integers are from 1 to this: tokens of any vocabulary, and none of them padding."""
_SEED: Final = 20_240_617
_PATTERN: Final = 65_537
"""Numbers drawn for an input, repeated to its size: a prime, so that no row of a picture begins like another."""


def probe_examples(info: ReferenceInfo) -> dict[str, npt.NDArray[Any]]:
    """Return `PROBES` examples of pseudo-random numbers.

    They come from the raw output of a counter-based generator, because NumPy may change its distributions.
    """
    return {declared.name: _probe(declared, at) for at, declared in enumerate(info.inputs)}


async def embed_probe(model: ReferenceModel, info: ReferenceInfo) -> npt.NDArray[np.float32]:
    """Embed the probe examples, or the neutral one if the model takes no such rows: `[n, 2, D]`.

    Raises:
        ReferenceModelError: If neither can be embedded.
    """
    try:
        return await model.embed(probe_examples(info))
    except ReferenceModelError as error:
        if not error.divisible:
            raise
        return await model.embed(neutral_example(info))


def _probe(declared: ReferenceInput, at: int) -> npt.NDArray[Any]:
    raw = np.random.Philox(key=[_SEED, at]).random_raw(_PATTERN)
    wanted = DATATYPES[declared.datatype].numpy
    numbers: npt.NDArray[Any]
    if declared.datatype == "UINT8":
        numbers = raw >> np.uint64(56)
    elif declared.datatype.startswith("INT"):
        numbers = raw % np.uint64(LARGEST_TOKEN) + np.uint64(1)
    else:
        numbers = (raw >> np.uint64(40)) / np.float64(1 << 23) - 1
    shape = [PROBES, *(OPEN_LENGTH if size < 0 else size for size in declared.shape)]
    return np.resize(numbers.astype(wanted), shape)
