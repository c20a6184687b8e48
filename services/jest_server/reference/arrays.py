"""What goes into a reference model and what comes out of it, held against its configuration before anything uses it.

Triton itself passes a model's outputs on unchecked: wrong shapes, wrong types and NaN all arrive as a success.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jest_server.domain.errors import ReferenceModelError
from jest_wire.tensors import DATATYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jest_server.domain.references import ReferenceInfo, ReferenceInput

    Arrays = Mapping[str, npt.NDArray[Any]]


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
    """Returns the array if it is one finite float32 row ``[D]`` for each example.

    Raises:
        ReferenceModelError: Otherwise; retryable, because the model may be put right.
    """
    expected = (examples, info.embedding_width)
    if array is None:
        raise broken_output(info, output, "is missing")
    if array.dtype != np.float32 or array.shape != expected:
        raise broken_output(info, output, f"is {array.dtype} {list(array.shape)}, expected float32 {list(expected)}")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        rows = np.flatnonzero(~finite)
        raise broken_output(
            info, output, f"has NaN or infinity in {rows.size} of {examples} rows, first in row {rows[0]}"
        )
    return array


def broken_output(info: ReferenceInfo, output: str, problem: str) -> ReferenceModelError:
    """Return the error for an output that cannot be used; retryable, because the model may be put right."""
    return ReferenceModelError(f"model {info.name}: output {output} {problem}", retryable=True)


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
