"""Find the examples that the reference model fails on: a batch that fails is halved until they are alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from jest_server.domain.errors import ReferenceModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import numpy.typing as npt

    from jest_server.domain.ports import ReferenceModel

MAX_EXTRA_PASSES: Final = 64
"""Bounds the search: one bad example among 128 takes 14 passes, four far apart 46; more may share one failure."""


@dataclass
class Embedded:
    """What became of each row of a batch: an embedding, `[2, D]`, or the error of the smallest part it failed in."""

    embeddings: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    failures: dict[int, ReferenceModelError] = field(default_factory=dict)


async def embed_by_halves(
    model: ReferenceModel, inputs: Mapping[str, npt.NDArray[Any]], *, on_extra_pass: Callable[[], None]
) -> Embedded:
    """Embed a batch; if it fails while the model works, embed its halves, and theirs, until single rows fail.

    Raises:
        ReferenceModelError: If the failure has nothing to do with the rows, or the model does not work at all now.
    """
    result, passes = Embedded(), 0
    parts = [range(len(next(iter(inputs.values()))))]
    while parts:
        rows = parts.pop()
        try:
            found = await model.embed({name: array[rows.start : rows.stop] for name, array in inputs.items()})
            result.embeddings.update(zip(rows, found, strict=True))
        except ReferenceModelError as error:
            if not error.divisible or not await model.ready():
                raise
            half = len(rows) // 2
            if half and passes + len(parts) + 2 <= MAX_EXTRA_PASSES:
                parts += [rows[half:], rows[:half]]
            else:
                result.failures.update(dict.fromkeys(rows, error))
        if parts:
            passes += 1
            on_extra_pass()
    return result
