"""The reference model's inputs on their way to the server: only the rows it asked for, in parts of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

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
        if array.ndim == 0 or array.shape[0] != rows:
            raise ValueError(f"features[{name!r}] has shape {list(array.shape)}, expected {rows} rows")


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
