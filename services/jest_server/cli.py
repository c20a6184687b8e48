"""The `jest-server` command."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer needs it at run time
from typing import Annotated

import typer

from jest_server import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)


@app.command()
def selector() -> None:
    """Run a selector, configured by JEST_* environment variables."""
    from jest_server.selector.__main__ import main as run  # noqa: PLC0415 - a scorer's machine may lack torch

    run()


@app.command()
def scorer() -> None:
    """Run a scorer, configured by JEST_* environment variables."""
    from jest_server.scorer.__main__ import main as run  # noqa: PLC0415 - loads what only a scorer needs

    run()


@app.command()
def up(
    model_repository: Annotated[
        Path, typer.Option(help="Triton model repository with the reference model and its encoders.")
    ],
    listen: Annotated[str, typer.Option(help="Host and port of the selector; port 0 takes a free one.")] = (
        "127.0.0.1:50051"
    ),
    reference_model: Annotated[str, typer.Option(help="Name of the reference model in the repository.")] = (
        "jest_reference"
    ),
    data_dir: Annotated[
        Path | None, typer.Option(help="Where logs and the queue's files go; none: a temporary folder.")
    ] = None,
) -> None:
    """Start the whole stack on this machine, until Ctrl-C."""
    from jest_server.embedded.up import run_until_interrupted  # noqa: PLC0415 - needs the [local] extra

    run_until_interrupted(
        model_repository=model_repository, listen=listen, reference_model=reference_model, data_dir=data_dir
    )


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point of the console script."""
    app()
