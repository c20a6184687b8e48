"""The user's function that makes the reference model's inputs, found by its name and held to what it returns."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jest_server.domain.errors import ReferenceModelError
from jest_server.reference.arrays import count_examples

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jest_server.domain.references import ReferenceInfo
    from jest_server.examples.decoding import Example

    Preprocess = Callable[[Sequence[Example]], Mapping[str, npt.NDArray[Any]]]


class PreprocessingError(Exception):
    """The function returns what the reference model does not take; no other batch will do better."""


class ExamplesRefused(Exception):
    """The function raised for these examples; others may do better."""


@dataclass(frozen=True)
class Preprocessing:
    """A function from examples to ``[n, ...]`` arrays by input name."""

    name: str
    function: Preprocess
    reference: ReferenceInfo

    def __call__(self, examples: Sequence[Example]) -> dict[str, npt.NDArray[Any]]:
        """Makes the model's inputs.

        Raises:
            ExamplesRefused: If the function raises.
            PreprocessingError: If names, datatypes, shapes or counts are not the model's, telling which.
        """
        try:
            made = self.function(examples)
        except Exception as error:
            raise ExamplesRefused(f"{self.name}: {error!r}") from error
        if not isinstance(made, dict) or not made:
            raise PreprocessingError(f"{self.name} returned {type(made).__name__}, expected a dict of numpy arrays")
        for name, array in made.items():
            if not isinstance(array, np.ndarray) or not array.ndim:
                raise PreprocessingError(
                    f"{self.name}: {name} is a {type(array).__name__}, expected a numpy array with a row per example"
                )
        try:
            count = count_examples(self.reference, made)
        except ReferenceModelError as error:
            raise PreprocessingError(f"{self.name} does not return what the reference model takes: {error}") from error
        if count != len(examples):
            raise PreprocessingError(f"{self.name} returned {count} rows, expected {len(examples)}, one per example")
        return made


def load_function(name: str) -> Preprocess:
    """Imports ``module:function``, also from the folder where the command was started.

    Raises:
        ValueError: If there is none, or its module cannot be imported.
    """
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ValueError(f"--preprocess is {name!r}, which cannot be imported: {error!r}") from error
    if not callable(found):
        raise ValueError(f"--preprocess is {name!r}, expected a function, not a {type(found).__name__}")  # noqa: TRY004 - bad input is always ValueError
    function: Preprocess = found
    return function
