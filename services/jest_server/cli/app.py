"""The `jest-server` command."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path  # noqa: TC003 - typer needs it at run time
from typing import Annotated

import typer

from jest_server import __version__
from jest_server.runtime.console import invalid_values_as_usage_errors, numbers, say

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
def control() -> None:
    """Run the REST service, configured by JEST_* environment variables."""
    from jest_server.control.__main__ import main as run  # noqa: PLC0415 - loads what only this process needs

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
    from jest_server.local.stack import run_until_interrupted  # noqa: PLC0415 - needs the [local] extra

    run_until_interrupted(
        model_repository=model_repository, listen=listen, reference_model=reference_model, data_dir=data_dir
    )


@app.command()
def health(
    address: Annotated[str, typer.Argument(help="HOST:PORT of gRPC health checks, or an http:// URL.")],
    *,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="How long to wait for the answer.")] = 4.0,
) -> None:
    """Ask a process whether it serves: status 0 if it does, 1 if not. What containers are checked with."""
    from jest_server.runtime.health_check import serves  # noqa: PLC0415 - what loads faster is checked cheaper

    well, answer = serves(address, timeout_s)
    typer.echo(answer)
    raise typer.Exit(0 if well else 1)


@app.command()
def size(  # noqa: PLR0913 - an argument for each option
    *,
    jobs: Annotated[str, typer.Option(help="Numbers of jobs, with commas between: a row for each.")] = "1,4,10,30,100",
    data_sets: Annotated[int, typer.Option(help="Different data sets among the jobs, at most.")] = 3,
    sub_batch: Annotated[int, typer.Option(help="Examples that a step trains on.")] = 4096,
    filter_ratio: Annotated[float, typer.Option(help="Share of a super-batch that is left out.")] = 0.8,
    num_chunks: Annotated[int, typer.Option(help="Chunks in which a sub-batch grows.")] = 16,
    width: Annotated[int, typer.Option(help="Width of learner and reference embeddings.")] = 768,
    steps_per_s: Annotated[float, typer.Option(help="Steps of each job in a second.")] = 1.0,
    examples: Annotated[int, typer.Option(help="Examples of each data set.")] = 100_000_000,
    cached: Annotated[float, typer.Option(help="Share of examples that are embedded already.")] = 0.9,
    feature_bytes: Annotated[
        int, typer.Option(help="Uploaded size of an example; 0: scorers read it by reference.")
    ] = 0,
    int8: Annotated[bool, typer.Option("--int8", help="The cache holds 8-bit integers.")] = False,
    reference_examples_per_s: Annotated[
        float, typer.Option(help="What one Triton replica embeds in a second.")
    ] = 2000.0,
    selector_gflops: Annotated[
        float, typer.Option(help="What a selector's device does in a second, in 10⁹.")
    ] = 10_000.0,
) -> None:
    """Tell what a deployment needs, by arithmetic on the options: replicas, memory, network. Nothing is measured."""
    from jest_server.cli.sizing import Load, table  # noqa: PLC0415 - needs an extra

    with invalid_values_as_usage_errors():
        loads = [
            Load(
                jobs=number,
                data_sets=min(data_sets, number),
                sub_batch=sub_batch,
                filter_ratio=filter_ratio,
                num_chunks=num_chunks,
                width=width,
                steps_per_s=steps_per_s,
                examples=examples,
                cached=cached,
                feature_bytes=feature_bytes,
                precision="int8" if int8 else "float16",
                reference_examples_per_s=reference_examples_per_s,
                selector_flops=selector_gflops * 1e9,
            )
            for number in numbers(jobs)
        ]
    typer.echo(table(loads))


@app.command()
def token(
    tenant: Annotated[str, typer.Argument(help="Whose token it is; a tenant sees its own jobs and no others.")],
    *,
    token_id: Annotated[str, typer.Option("--id", help="Name of this token among all: it is what logs show.")],
    file: Annotated[Path, typer.Option(help="Token file to add it to, as JEST_TOKENS_FILE names it.")],
    days: Annotated[int | None, typer.Option(min=1, help="Days until it expires; none: never.")] = None,
) -> None:
    """Make a bearer token: its hash goes into the file, the token itself to standard output and nowhere else."""
    from jest_server.runtime.security.tokens import add_token  # noqa: PLC0415 - needs the [scorer] extra

    expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)
    try:
        secret = add_token(file, token_id, tenant, expires_at=expires_at)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(secret)


@app.command()
def embed(  # noqa: PLR0913 - an argument for each option
    *,
    output: Annotated[str, typer.Option(help="Folder or URL of the embeddings, as JEST_EMBEDDINGS_URL names it.")],
    data: Annotated[
        str, typer.Option(help="WebDataset tars, such as 's3://bucket/{000..099}.tar', or a folder of pictures.")
    ] = "",
    preprocess: Annotated[
        str, typer.Option(help="MODULE:FUNCTION that makes the reference model's inputs of examples.")
    ] = "",
    key: Annotated[str, typer.Option(help="How trainers call an example: {key} in the shard, {shard} its name.")] = (
        "{key}"
    ),
    caption: Annotated[str, typer.Option(help="Where captions are: txt, or json:FIELD.")] = "txt",
    batch: Annotated[int, typer.Option(help="Examples that are preprocessed and embedded together.")] = 256,
    shard_index: Annotated[
        int | None, typer.Option(help="Which share is this process's; else JOB_COMPLETION_INDEX, else 0.")
    ] = None,
    num_shards: Annotated[int | None, typer.Option(help="Number of shares; else JEST_NUM_SHARDS, else 1.")] = None,
    folder_shard_examples: Annotated[int, typer.Option(help="Examples of a folder that make one file.")] = 10_000,
    max_member_bytes: Annotated[int, typer.Option(help="Larger files are not read.")] = 64 << 20,
    max_left_out: Annotated[float, typer.Option(help="Share of a shard's examples that may be unreadable.")] = 0.01,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file in the output again instead.")] = False,
) -> None:
    """Embed a data set offline with the reference model that a scorer's JEST_* settings name."""
    from jest_server.embed import command  # noqa: PLC0415 - needs the [embeddings] extra
    from jest_server.examples.options import EmbedOptions  # noqa: PLC0415 - ... nor pictures
    from jest_server.runtime.settings import EmbedSettings  # noqa: PLC0415 - as above

    with invalid_values_as_usage_errors():
        if verify:
            raise typer.Exit(command.verify_all(output, say))
        share = EmbedSettings()
        options = EmbedOptions(
            data=data,
            output=output,
            preprocess=preprocess,
            key=key,
            caption=caption,
            batch=batch,
            shard_index=share.shard_index if shard_index is None else shard_index,
            num_shards=share.num_shards if num_shards is None else num_shards,
            folder_shard_examples=folder_shard_examples,
            max_member_bytes=max_member_bytes,
            max_left_out=max_left_out,
        )
        prepared = command.prepare(options)
    raise typer.Exit(command.embed(prepared))


@app.command()
def metrics() -> None:
    """Print what every process measures, as Markdown."""
    from jest_server.runtime.metrics_page import page  # noqa: PLC0415 - needs an extra

    typer.echo(page(), nl=False)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point of the console script."""
    app()
