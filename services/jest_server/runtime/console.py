"""How commands parse values and print progress; only their results go to standard output."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def invalid_values_as_usage_errors() -> Iterator[None]:
    """Report a `ValueError` as a usage error of the command line."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def numbers(text: str) -> tuple[int, ...]:
    """Return integers that are separated by commas.

    Raises:
        ValueError: If one of them is not an integer.
    """
    return tuple(map(int, text.split(",")))


def say(sentence: str) -> None:
    """Print a line of progress to standard error."""
    typer.echo(sentence, err=True)
