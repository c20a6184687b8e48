"""`python -m jest_bench`: one command per benchmark, each loaded only when it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jest_server.runtime.console import invalid_values_as_usage_errors, numbers, say

app = typer.Typer(no_args_is_help=True, help="Measure this machine; tables go to standard output.")

JsonFile = Annotated[Path | None, typer.Option("--json", help="File for the result, with all that was measured.")]


@app.command()
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
    from jest_bench import selection as benchmark  # noqa: PLC0415 - loads torch

    with invalid_values_as_usage_errors():
        options = benchmark.Options(
            sizes=numbers(sizes),
            width=width,
            filter_ratio=filter_ratio,
            num_chunks=num_chunks,
            runs=runs,
        )
    result = benchmark.measure(options, say)
    _tell(result, benchmark.tables(result), json_file)


@app.command()
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
    from jest_bench import rpc as benchmark  # noqa: PLC0415 - loads torch

    with invalid_values_as_usage_errors():
        options = benchmark.Options(rows=rows, width=width, datatype=datatype, ranks=numbers(ranks), runs=runs)
    result = benchmark.measure(options, say)
    _tell(result, benchmark.tables(result), json_file)


@app.command()
def rounding(
    *,
    sizes: Annotated[str, typer.Option(help="Rows of the super-batches, with commas between.")] = "1024,4096,16384",
    width: Annotated[int, typer.Option(min=1, help="Width of learner and reference embeddings.")] = 512,
    filter_ratio: Annotated[float, typer.Option(help="Share of a super-batch that is left out.")] = 0.8,
    seeds: Annotated[int, typer.Option(min=1, help="Super-batches of each size.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Count which pairs are chosen all the same if the cache rounds the reference embeddings."""
    from jest_bench import rounding as benchmark  # noqa: PLC0415 - loads torch

    with invalid_values_as_usage_errors():
        options = benchmark.Options(sizes=numbers(sizes), width=width, filter_ratio=filter_ratio, seeds=seeds)
    result = benchmark.measure(options)
    _tell(result, benchmark.tables(result), json_file)


@app.command("scorer")
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
    from jest_bench import scorer as benchmark  # noqa: PLC0415 - loads torch

    with invalid_values_as_usage_errors():
        options = benchmark.Options(
            model_repository=model_repository,
            examples=examples,
            rows=rows,
            scorers=scorers,
            jobs=numbers(jobs),
            apart=numbers(apart),
            runs=runs,
        )
    result = benchmark.measure(options, say)
    _tell(result, benchmark.tables(result), json_file)


@app.command()
def memory(
    *,
    model_repository: Annotated[Path, typer.Option(help="Triton model repository with the model jest_reference.")],
    seconds: Annotated[float, typer.Option(help="How long.")] = 600.0,
    overload: Annotated[float, typer.Option(help="How many times as much is offered as can be embedded.")] = 10.0,
    json_file: JsonFile = None,
) -> None:
    """Watch the memory of every process while producers offer ten times too much."""
    from jest_bench import memory as benchmark  # noqa: PLC0415 - loads what only a benchmark needs

    with invalid_values_as_usage_errors():
        options = benchmark.Options(model_repository=model_repository, seconds=seconds, overload=overload)
    result = benchmark.measure(options, say)
    _tell(result, benchmark.tables(result), json_file)


def _tell(result: dict[str, Any], tables: str, json_file: Path | None) -> None:
    """Prints what a benchmark found, and keeps it."""
    from jest_bench import report  # noqa: PLC0415 - describes versions of what other commands do not need

    typer.echo(f"{report.describe(result['machine'])}\n\n{tables}")
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
