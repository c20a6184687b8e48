"""The reference model's inputs on their way to the server: only the rows it asked for, in parts of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from jest_wire.tensors import DATATYPES

if TYPE_CHECKING:
    from jest_trainer.results import ReferenceModel

Array = torch.Tensor | npt.NDArray[np.generic]

PART_BYTES = 16 << 20
"""Target size of one upload: the scorer can start on the first part while the next is on its way."""


def check_features(features: Mapping[str, Array], rows: int) -> None:
    """Refuse features that do not have `rows` rows.

    Raises:
        ValueError: there are no features, or one is not an array with `rows` rows.
    """
    if not isinstance(features, Mapping) or not features:
        raise ValueError(f"features must be a mapping of one or more named arrays, not {features!r:.200}")
    for name, array in features.items():
        if not isinstance(array, torch.Tensor | np.ndarray):
            raise ValueError(f"features[{name!r}] must be a tensor or a NumPy array, not {type(array).__name__}")  # noqa: TRY004 - bad input is always ValueError
        if isinstance(array, torch.Tensor) and (array.is_nested or array.layout is not torch.strided):
            raise ValueError(
                f"features[{name!r}] must be a dense tensor, not {_layout(array)}: pad it, or use to_dense()"
            )
        if hasattr(array, "full_tensor"):
            raise ValueError(f"features[{name!r}] is a DTensor: use to_local() or full_tensor()")
        if array.ndim == 0 or array.shape[0] != rows:
            raise ValueError(f"features[{name!r}] has shape {list(array.shape)}, expected {rows} rows")


def check_reference_inputs(features: Mapping[str, Array], reference: ReferenceModel) -> None:
    """Refuse features that the reference model does not take.

    Raises:
        ValueError: names, dtypes or shapes differ from the model's inputs.
    """
    inputs = {expected.name: expected for expected in reference.inputs}
    if set(features) != set(inputs):
        raise ValueError(
            f"features are {sorted(features)}, expected {sorted(inputs)}: the inputs of reference model "
            f"{reference.name!r} (version {reference.version})"
        )
    for name, array in features.items():
        expected = inputs[name]
        datatype = DATATYPES.get(expected.datatype)
        dtype = str(array.dtype).removeprefix("torch.")
        if datatype is not None and dtype != datatype.torch:
            raise ValueError(
                f"features[{name!r}] has dtype {dtype}, reference model {reference.name!r} takes {datatype.torch}: "
                "convert it in features"
            )
        shape = tuple(array.shape[1:])
        fits = len(shape) == len(expected.shape) and all(
            want in (-1, have) for want, have in zip(expected.shape, shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"features[{name!r}] has shape {list(shape)} per row, reference model {reference.name!r} takes "
                f"{list(expected.shape)} (-1 is any length)"
            )


def parts(
    features: Mapping[str, Array], rows: Sequence[int], *, part_bytes: int = PART_BYTES
) -> Iterator[tuple[slice, dict[str, Array]]]:
    """Cut `rows` (ascending) of all features into parts of about `part_bytes`, copying one part at a time.

    Yields:
        Which of `rows` the part holds, and their features.
    """
    total = sum(array.nbytes for array in features.values())
    available = max(next(iter(features.values())).shape[0], 1)
    step = max(part_bytes // max(total // available, 1), 1)
    for start in range(0, len(rows), step):
        chosen = rows[start : start + step]
        contiguous = chosen[-1] - chosen[0] == len(chosen) - 1
        index = slice(chosen[0], chosen[-1] + 1) if contiguous else list(chosen)
        yield slice(start, start + len(chosen)), {name: array[index] for name, array in features.items()}


def _layout(array: torch.Tensor) -> str:
    return "nested" if array.is_nested else str(array.layout).removeprefix("torch.")
