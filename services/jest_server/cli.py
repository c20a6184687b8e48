"""The `jest-server` command."""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jest_server import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
bench = typer.Typer(no_args_is_help=True, help="Measure this machine; tables go to standard output.")
app.add_typer(bench, name="bench")

JsonFile = Annotated[Path | None, typer.Option("--json", help="File for the result, with all that was measured.")]


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
    from jest_server.embedded.up import run_until_interrupted  # noqa: PLC0415 - needs the [local] extra

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
    from jest_server.health_check import serves  # noqa: PLC0415 - what loads faster is checked cheaper

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
    from jest_server.sizing import Load, table  # noqa: PLC0415 - needs an extra

    with _telling_bad_values():
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
            for number in _numbers(jobs)
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
    from jest_server.security.tokens import add_token  # noqa: PLC0415 - needs the [scorer] extra

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
    from jest_server.embeddings import command  # noqa: PLC0415 - needs the [embeddings] extra
    from jest_server.embeddings.options import EmbedOptions  # noqa: PLC0415 - as above
    from jest_server.settings import EmbedSettings  # noqa: PLC0415 - as above

    try:
        if verify:
            raise typer.Exit(command.verify_all(output, _say))
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
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(command.embed(prepared))


@bench.command()
def selection(
    *,
    sizes: Annotated[str, typer.Option(help="Rows of the super-batches to measure, with commas between.")] = (
        "1024,2048,4096,8192,16384,32768,65536"
    ),
    width: Annotated[int, typer.Option(min=1, help="Width of learner and reference embeddings.")] = 512,
    filter_ratio: Annotated[float, typer.Option(help="Share of a super-batch that is left out.")] = 0.8,
    num_chunks: Annotated[int, typer.Option(min=1, help="Chunks in which a sub-batch grows.")] = 16,
    runs: Annotated[int, typer.Option(min=1, help="Runs that count, after one that does not.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Measure the selection against dense ones, against its bare products, by size, loss and precision."""
    from jest_server.bench import selection as benchmark  # noqa: PLC0415 - loads torch

    with _telling_bad_values():
        options = benchmark.Options(
            sizes=_numbers(sizes),
            width=width,
            filter_ratio=filter_ratio,
            num_chunks=num_chunks,
            runs=runs,
        )
    result = benchmark.measure(options, _say)
    _tell(result, benchmark.tables(result), json_file)


@bench.command()
def rpc(
    *,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the super-batch, all ranks together.")] = 8192,
    width: Annotated[int, typer.Option(min=1, help="Width of learner and reference embeddings.")] = 512,
    datatype: Annotated[str, typer.Option(help="What the learner's embeddings are sent as: FP32, FP16 or BF16.")] = (
        "FP16"
    ),
    ranks: Annotated[str, typer.Option(help="Numbers of ranks to measure, with commas between.")] = "1,2,8",
    runs: Annotated[int, typer.Option(min=1, help="Runs that count, after one that does not.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Measure SelectSubBatch against the same selection in process."""
    from jest_server.bench import rpc as benchmark  # noqa: PLC0415 - loads torch

    with _telling_bad_values():
        options = benchmark.Options(rows=rows, width=width, datatype=datatype, ranks=_numbers(ranks), runs=runs)
    result = benchmark.measure(options, _say)
    _tell(result, benchmark.tables(result), json_file)


@bench.command()
def rounding(
    *,
    sizes: Annotated[str, typer.Option(help="Rows of the super-batches, with commas between.")] = "1024,4096,16384",
    width: Annotated[int, typer.Option(min=1, help="Width of learner and reference embeddings.")] = 512,
    filter_ratio: Annotated[float, typer.Option(help="Share of a super-batch that is left out.")] = 0.8,
    seeds: Annotated[int, typer.Option(min=1, help="Super-batches of each size.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Count which pairs are chosen all the same if the cache rounds the reference embeddings."""
    from jest_server.bench import rounding as benchmark  # noqa: PLC0415 - loads torch

    with _telling_bad_values():
        options = benchmark.Options(sizes=_numbers(sizes), width=width, filter_ratio=filter_ratio, seeds=seeds)
    result = benchmark.measure(options)
    _tell(result, benchmark.tables(result), json_file)


@bench.command("scorer")
def bench_scorer(
    *,
    model_repository: Annotated[Path, typer.Option(help="Triton model repository with the model jest_reference.")],
    examples: Annotated[int, typer.Option(min=1, help="Examples that the jobs share.")] = 20_000,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a super-batch.")] = 1_000,
    scorers: Annotated[int, typer.Option(min=1, help="Scorer processes.")] = 2,
    jobs: Annotated[str, typer.Option(help="Numbers of jobs that share the data, with commas between.")] = "1,2,4,8",
    apart: Annotated[str, typer.Option(help="The same for jobs that share nothing.")] = "1,2,4,8",
    runs: Annotated[int, typer.Option(min=1, help="Runs that count, after one that does not.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Measure the scorers: throughput, cache, and what several jobs over the same data cost."""
    from jest_server.bench import scorer as benchmark  # noqa: PLC0415 - loads torch

    with _telling_bad_values():
        options = benchmark.Options(
            model_repository=model_repository,
            examples=examples,
            rows=rows,
            scorers=scorers,
            jobs=_numbers(jobs),
            apart=_numbers(apart),
            runs=runs,
        )
    result = benchmark.measure(options, _say)
    _tell(result, benchmark.tables(result), json_file)


@bench.command()
def memory(
    *,
    model_repository: Annotated[Path, typer.Option(help="Triton model repository with the model jest_reference.")],
    seconds: Annotated[float, typer.Option(help="How long.")] = 600.0,
    overload: Annotated[float, typer.Option(help="How many times as much is offered as can be embedded.")] = 10.0,
    json_file: JsonFile = None,
) -> None:
    """Watch the memory of every process while producers offer ten times too much."""
    from jest_server.bench import memory as benchmark  # noqa: PLC0415 - loads what only a benchmark needs

    with _telling_bad_values():
        options = benchmark.Options(model_repository=model_repository, seconds=seconds, overload=overload)
    result = benchmark.measure(options, _say)
    _tell(result, benchmark.tables(result), json_file)


@app.command()
def metrics() -> None:
    """Print what every process measures, as Markdown."""
    from jest_server.metrics_page import page  # noqa: PLC0415 - needs an extra

    typer.echo(page(), nl=False)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@contextmanager
def _telling_bad_values() -> Iterator[None]:
    """Turns what cannot be into what the command line says of wrong options."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers with commas between."""
    return tuple(map(int, text.split(",")))


def _say(sentence: str) -> None:
    typer.echo(sentence, err=True)


def _tell(result: dict[str, Any], tables: str, json_file: Path | None) -> None:
    """Prints what a benchmark found, and keeps it."""
    from jest_server.bench import report  # noqa: PLC0415 - describes versions of what other commands do not need

    typer.echo(f"{report.describe(result['machine'])}\n\n{tables}")
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    """Entry point of the console script."""
    app()
