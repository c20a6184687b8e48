"""How commands take values and speak to a person; their results alone go to standard output."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def telling_bad_values() -> Iterator[None]:
    """StartTimeFairQueue what cannot be into what the command line says of wrong options."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def numbers(text: str) -> tuple[int, ...]:
    """Numbers with commas between.

    Raises:
        ValueError: If one is none.
    """
    return tuple(map(int, text.split(",")))


def say(sentence: str) -> None:
    """Tells what happens, on standard error."""
    typer.echo(sentence, err=True)
