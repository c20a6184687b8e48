"""What the scorers add to the reference model's own time, and what sharing them saves.

Run it with `python -m jest_bench scorer`. Four questions: how fast examples go through selector, queue, scorers and
Triton against a bare loop of the same Triton client; how fast cached embeddings come against Redis' own MGET of the
same bytes; how many inferences several jobs over the same data cost; and how long they take together against each for
itself.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redis.asyncio import Redis

from jest_bench import report
from jest_bench.jobs import BenchJob, DataSet
from jest_bench.scoring_stack import REFERENCE_MODEL, ScoringStack
from jest_server.domain.references import ReferenceInfo
from jest_server.domain.super_batches import Limits, Submission
from jest_server.reference.triton import TritonReferenceModel, TritonSettings
from jest_server.selector.decide.join_reference import join_reference
from jest_server.stores.redis.embedding_cache import RedisEmbeddingCache
from jest_server.stores.redis.stores import open_redis_stores

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

BARE_SLICE = 2048
MGET_KEYS = 1000
"""Keys in one MGET, as the cache's own."""
KILL_POLL_S = 0.02


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model_repository: Path
    examples: int = 20_000
    rows: int = 1_000
    at_a_time: int = 4
    scorers: int = 2
    jobs: tuple[int, ...] = (1, 2, 4, 8)
    apart: tuple[int, ...] = (1, 2, 4)
    microbatch: int = 64
    concurrent_inferences: int = 4
    runs: int = 5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if name != "model_repository" and (not numbers or min(numbers) < 1):
                raise ValueError(f"{name} is {value}, expected numbers of at least 1")
        if self.examples % self.rows:
            raise ValueError(f"examples ({self.examples}) is no multiple of rows ({self.rows})")


def measure(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures everything; ``say`` is told what is being done.

    Raises:
        ServerStartError: If a part does not come up.
        grpc.RpcError: If a job's call fails.
        RuntimeError: If jobs got other embeddings than there are examples.
    """
    settings = {"microbatch": options.microbatch, "concurrent_inferences": options.concurrent_inferences}
    with ScoringStack(options.model_repository, scorers=options.scorers, settings=settings) as stack:
        bench = _Bench(stack, options, say)
        throughput = bench.throughput()
        cached = asyncio.run(bench.cached())
        shared = [bench.jobs(count, apart=False) for count in options.jobs]
        apart = [bench.jobs(count, apart=True) for count in options.apart]
        killed = bench.jobs(max(options.jobs), apart=False, kill_half_way=True)
    return {
        "benchmark": "scorer",
        "machine": report.machine(),
        "stands_on": stack.stands_on,
        **{key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()},
        "throughput": throughput,
        "cached": cached,
        "shared": shared,
        "apart": apart,
        "killed": killed,
    }


class _Bench:
    def __init__(self, stack: ScoringStack, options: Options, say: Callable[[str], None]) -> None:
        self._stack = stack
        self._options = options
        self._say = say
        self._runs = 0
        probe = self._job("probe")
        self._data = DataSet.random(probe.job.reference.inputs, options.examples)
        self._width = probe.job.reference.embedding_width
        probe.close()

    def throughput(self) -> dict[str, Any]:
        """One job over new examples, and the bare client over the same; they take turns."""
        examples = self._options.examples // self._options.rows // 4 * self._options.rows or self._options.rows
        data = DataSet({name: array[:examples] for name, array in self._data.features.items()})
        seconds: dict[str, list[float]] = {"bare": [], "served": []}
        for turn in range(self._options.runs + 1):
            self._say(f"throughput, turn {turn} of {self._options.runs}")
            bare = asyncio.run(self._bare(data))
            job = self._job("throughput")
            run = job.train(data, keys=self._name("new"))
            job.close()
            if run.reference_inferences != examples:
                raise RuntimeError(f"{run.reference_inferences} inferences for {examples} new examples")
            if turn:
                seconds["bare"].append(bare)
                seconds["served"].append(run.seconds)
        bare_s, served_s = (statistics.median(seconds[name]) for name in ("bare", "served"))
        return {
            "examples": examples,
            "bare_per_s": examples / bare_s,
            "served_per_s": examples / served_s,
            "ratio": bare_s / served_s,
            "runs": seconds,
        }

    async def cached(self) -> dict[str, Any]:
        """Embeddings that are there: as the selector gets them, as the cache gives them, and as Redis does."""
        self._say("cached")
        rows, width = self._options.examples, self._width
        info = ReferenceInfo(
            name="bench", version="1", preprocessing_id="p", scale=1, bias=0, embedding_width=width, inputs=()
        )
        keys = [f"cached-{row}" for row in range(rows)]
        cache = RedisEmbeddingCache.from_url(self._stack.cache_url)
        stores = open_redis_stores(self._stack.queue_url)
        probe = self._job("cached")
        submission = Submission(
            job=probe.job.spec.name,
            super_batch_id="sb",
            rank=0,
            world_size=1,
            step=0,
            reference=info,
            keys=tuple(keys),
            digest="d",
        )
        await stores.super_batches.submit(submission, limits=Limits(), ttl_s=3600, now_s=time.time())
        super_batch = await stores.super_batches.get_super_batch(submission.ref)
        assert super_batch is not None, "it was submitted just now"
        async with Redis.from_url(self._stack.cache_url) as redis:
            names = [f"raw-{row}" for row in range(rows)]
            for start in range(0, rows, MGET_KEYS):
                await cache.put(info, dict.fromkeys(keys[start : start + MGET_KEYS], bytes(info.value_bytes)))
                await redis.mset(dict.fromkeys(names[start : start + MGET_KEYS], bytes(info.value_bytes)))

            async def mget() -> None:
                for start in range(0, rows, MGET_KEYS):
                    await redis.mget(names[start : start + MGET_KEYS])

            seconds = await _alternate(
                {
                    "mget": mget,
                    "cache": lambda: cache.get(info, keys),
                    "joined": lambda: join_reference(stores.super_batches, cache, super_batch),
                },
                runs=self._options.runs,
            )
        await cache.close()
        await stores.connection.close()
        probe.close()
        return {"rows": rows, "value_bytes": info.value_bytes, "seconds": seconds}

    def jobs(self, count: int, *, apart: bool, kill_half_way: bool = False) -> dict[str, Any]:
        """So many jobs over the same examples at once; apart, each with keys of its own shares nothing."""
        self._say(f"{count} jobs, {'each for itself' if apart else 'shared'}{', one killed' * kill_half_way}")
        before, name = self._stack.inferences(), self._name("set")
        jobs = [self._job(f"job-{number}") for number in range(count)]
        started = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            runs = [
                pool.submit(job.train, self._data, keys=f"{name}-{number}" if apart else name)
                for number, job in enumerate(jobs)
            ]
            if kill_half_way:
                while self._stack.inferences() - before < len(self._data) / 2:
                    time.sleep(KILL_POLL_S)
                self._stack.scorers[-1].kill()
            finished = [run.result() for run in runs]
        seconds = time.perf_counter() - started
        inferences = self._stack.inferences() - before
        for job in jobs:
            job.close()
        if kill_half_way:
            self._stack.scorers[-1].start()
        return {
            "jobs": count,
            "examples": len(self._data),
            "inferences": inferences,
            "inferences_per_example": inferences / len(self._data),
            "seconds": seconds,
            "runs_s": [run.seconds for run in finished],
        }

    async def _bare(self, data: DataSet) -> float:
        options = self._options
        settings = TritonSettings(
            url=self._stack.triton.grpc_url,
            model=REFERENCE_MODEL,
            microbatch=options.microbatch,
            concurrency=options.concurrent_inferences * options.scorers,
        )
        model = TritonReferenceModel(settings)
        await model.info()
        started = time.perf_counter()
        for start in range(0, len(data), BARE_SLICE):
            await model.embed({name: array[start : start + BARE_SLICE] for name, array in data.features.items()})
        seconds = time.perf_counter() - started
        await model.close()
        return seconds

    def _job(self, name: str) -> BenchJob:
        options = self._options
        return BenchJob(self._stack.address, self._name(name), rows=options.rows, at_a_time=options.at_a_time)

    def _name(self, name: str) -> str:
        """A name that was not used before."""
        self._runs += 1
        return f"{name}-{self._runs}"


async def _alternate(works: dict[str, Callable[[], Awaitable[Any]]], *, runs: int) -> dict[str, float]:
    """As ``report.alternate``, in the event loop that is running."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(runs + 1):
        for name, work in works.items():
            started = time.perf_counter()
            await work()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def tables(result: dict[str, Any]) -> str:
    """Renders a result as Markdown."""
    through, cached = result["throughput"], result["cached"]
    seconds, rows = cached["seconds"], cached["rows"]
    first = report.markdown(
        ["examples", "bare client /s", "through the server /s", "ratio"],
        [
            [
                f"{through['examples']:,}",
                *(f"{through[name]:,.0f}" for name in ("bare_per_s", "served_per_s")),
                f"{through['ratio']:.2f}",
            ]
        ],
    )
    second = report.markdown(
        ["rows", "MGET /s", "cache /s", "joined by the selector /s", "cache ÷ MGET", "joined ÷ MGET"],
        [
            [
                f"{rows:,}",
                *(f"{rows / seconds[name]:,.0f}" for name in ("mget", "cache", "joined")),
                *(f"{seconds['mget'] / seconds[name]:.2f}" for name in ("cache", "joined")),
            ]
        ],
    )
    apart = {row["jobs"]: row["seconds"] for row in result["apart"]}
    killed = result["killed"]
    third = report.markdown(
        ["jobs", "inferences", "per example", "seconds", "each for itself, s", "ratio"],
        [
            [
                label,
                f"{row['inferences']:,}",
                f"{row['inferences_per_example']:.3f}",
                f"{row['seconds']:.1f}",
                f"{apart[row['jobs']]:.1f}" if row["jobs"] in apart and row is not killed else "–",
                f"{apart[row['jobs']] / row['seconds']:.2f}×" if row["jobs"] in apart and row is not killed else "–",
            ]
            for label, row in [
                *((str(row["jobs"]), row) for row in result["shared"]),
                (f"{killed['jobs']}, a scorer killed half-way", killed),
            ]
        ],
    )
    legend = (
        f"{result['examples']:,} examples in super-batches of {result['rows']:,}, {result['scorers']} scorers; "
        f"{result['stands_on']}. Rates are medians of {result['runs']} runs. A job's conversations go "
        "through gRPC, selector, queue, scorer and Triton, and end with a selection. Inferences are what Triton "
        "itself counts."
    )
    return f"{legend}\n\n{first}\n\n{second}\n\n{third}"
