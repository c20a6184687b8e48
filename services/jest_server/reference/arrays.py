"""What goes into a reference model and what comes out of it, held against its configuration before anything uses it.

Triton itself passes a model's outputs on unchecked: wrong shapes, wrong types and NaN all arrive as a success.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from jest_server.domain.errors import ReferenceModelError
from jest_server.reference.config import OUTPUTS
from jest_wire.tensors import DATATYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jest_server.domain.references import ReferenceInfo, ReferenceInput

    Arrays = Mapping[str, npt.NDArray[Any]]

MIN_NORM: Final = 0.01
"""Below it, the values of wide rows are among float16's subnormal numbers, and lose digits; zero has no direction."""
MAX_NORM: Final = 1000.0
"""Normalised rows have norm 1, raw ones of known models up to about 100; more is an overflow in the making."""


def count_examples(info: ReferenceInfo, inputs: Arrays) -> int:
    """Returns how many examples ``inputs`` hold.

    Raises:
        ReferenceModelError: Not retryable, if names, datatypes, shapes or counts are not the model's.
    """
    expected = {declared.name: declared for declared in info.inputs}
    if inputs.keys() != expected.keys():
        raise _refused(info, "inputs", sorted(inputs), f"{sorted(expected)}")
    for name, array in inputs.items():
        _check_input(info, expected[name], array)
    counts = {name: len(array) for name, array in inputs.items()}
    if len(set(counts.values())) > 1:
        raise _refused(info, "examples of the inputs", counts, "as many of each")
    return next(iter(counts.values()))


def neutral_example(info: ReferenceInfo) -> dict[str, npt.NDArray[Any]]:
    """Returns one example of zeros, of length 1 where the length is open: any model has to embed it."""
    return {
        declared.name: np.zeros([1, *(abs(size) for size in declared.shape)], DATATYPES[declared.datatype].numpy)
        for declared in info.inputs
    }


def checked_embedding(
    info: ReferenceInfo, output: str, array: npt.NDArray[Any] | None, *, examples: int
) -> npt.NDArray[np.float32]:
    """Return the array if it is one float32 row `[D]` for each example, finite and still finite as float16.

    Raises:
        ReferenceModelError: Otherwise; retryable, because the model may be put right.
    """
    expected = (examples, info.embedding_width)
    if array is None:
        raise broken_output(info, output, "is missing")
    if array.dtype != np.float32 or array.shape != expected:
        raise broken_output(info, output, f"is {array.dtype} {list(array.shape)}, expected float32 {list(expected)}")
    _require_rows(info, output, np.isfinite(array).all(axis=1), "has NaN or infinity")
    _require_rows(info, output, np.isfinite(_as_cached(array)).all(axis=1), "has values beyond float16")
    return array


def check_norms(info: ReferenceInfo, embeddings: npt.NDArray[np.float32]) -> None:
    """Check the rows of real examples, `[n, 2, D]` as `checked_embedding` passed them, as the cache will hold them.

    The neutral example is exempt: a caption of padding alone may well embed to zeros.

    Raises:
        ReferenceModelError: If a norm is not from `MIN_NORM` to `MAX_NORM`; retryable, because the model may be put
            right.
    """
    for column, output in enumerate(OUTPUTS):
        norms = np.linalg.norm(_as_cached(embeddings[:, column]).astype(np.float32), axis=1)
        good = (norms >= MIN_NORM) & (norms <= MAX_NORM)
        _require_rows(info, output, good, f"has norms outside {MIN_NORM:g} to {MAX_NORM:g}")


def broken_output(info: ReferenceInfo, output: str, problem: str) -> ReferenceModelError:
    """Return the error for an output that cannot be used; retryable, because the model may be put right."""
    return ReferenceModelError(f"model {info.name}: output {output} {problem}", retryable=True, divisible=True)


def _as_cached(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Round as every embedding is rounded before use; int8 keeps a row finite and its largest value (tested)."""
    with np.errstate(over="ignore"):  # what overflows is found afterwards
        return array.astype(np.float16)


def _require_rows(info: ReferenceInfo, output: str, good: npt.NDArray[np.bool_], problem: str) -> None:
    if not good.all():
        rows = np.flatnonzero(~good)
        raise broken_output(info, output, f"{problem} in {rows.size} of {good.size} rows, first in row {rows[0]}")


def _check_input(info: ReferenceInfo, declared: ReferenceInput, array: npt.NDArray[Any]) -> None:
    wanted = DATATYPES[declared.datatype].numpy
    if array.dtype != wanted:
        raise _refused(info, f"datatype of input {declared.name}", array.dtype, f"{wanted}")
    fits = array.ndim == 1 + len(declared.shape) and all(
        size in (-1, found) for size, found in zip(declared.shape, array.shape[1:], strict=True)
    )
    if not fits:
        raise _refused(
            info, f"shape of input {declared.name}", list(array.shape), f"[n, {str(list(declared.shape))[1:]}"
        )


def _refused(info: ReferenceInfo, what: str, found: object, expected: str) -> ReferenceModelError:
    return ReferenceModelError(f"model {info.name}: {what}: {found}, expected {expected}", retryable=False)
