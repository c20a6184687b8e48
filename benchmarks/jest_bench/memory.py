"""Whether memory stays flat while producers offer ten times what the reference model can take.

Run it with `python -m jest_bench memory`. Producers submit and upload new super-batches at a fixed rate, whatever
becomes of them. A refused producer retries after the delay it was given, until its deadline. One super-batch in five is
selected; the rest end by their time to live. The resident memory of every process and of Redis is sampled.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from redis import Redis

from jest_bench import report
from jest_bench.jobs import BenchJob, DataSet
from jest_bench.scoring_stack import ScoringStack

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 250
JOBS = 4
PRODUCERS = 32
"""Calls that are under way at the same moment, at most; offers beyond them are counted and dropped."""
DEADLINE_S = 5.0
TTL_S = 20
SELECTED = 5
"""One super-batch in so many is selected."""
WARM_UP = 0.2
"""Share of the run in which buffers fill and allocators settle."""
SELECTOR: dict[str, object] = {
    "decision_keep_s": 30,
    "max_feature_bytes": 64 << 20,
    "max_feature_bytes_per_job": 32 << 20,
}
CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model_repository: Path
    seconds: float = 600.0
    overload: float = 10.0
    sample_s: float = 5.0
    scorers: int = 2

    def __post_init__(self) -> None:
        for name in ("seconds", "overload", "sample_s", "scorers"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number larger than 0")


def measure(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs the producers and watches; ``say`` is told what is being done.

    Raises:
        ServerStartError: If a part does not come up.
    """
    with ScoringStack(
        options.model_repository, scorers=options.scorers, selector_settings=SELECTOR, cache_bytes=CACHE_BYTES
    ) as stack:
        jobs = [BenchJob(stack.address, f"job-{i}", rows=ROWS, at_a_time=64, ttl_s=TTL_S) for i in range(JOBS)]
        data = DataSet.random(jobs[0].job.reference.inputs, 8 * ROWS)
        say("how fast the reference model is")
        rate = len(data) / jobs[0].train(data, keys="rate").seconds
        say(f"{rate:,.0f} examples a second; {options.overload:g} times as many for {options.seconds:g} s")
        producers = _Producers(jobs, data, super_batches_per_s=options.overload * rate / ROWS)
        samples = _watch(stack, options, producers)
        outcomes = producers.stop()
        scored = stack.inferences()
    return {
        "benchmark": "memory",
        "machine": report.machine(),
        "stands_on": stack.stands_on,
        **{key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()},
        "examples_per_s": rate,
        "scored": scored,
        "outcomes": outcomes,
        "samples": samples,
    }


class _Producers:
    """Offers super-batches at a steady rate from threads of its own."""

    def __init__(self, jobs: list[BenchJob], data: DataSet, *, super_batches_per_s: float) -> None:
        self._jobs = jobs
        self._data = data
        self._interval_s = 1 / super_batches_per_s
        self._outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._free = threading.Semaphore(PRODUCERS)
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(PRODUCERS)
        self._pacer = threading.Thread(target=self._pace, daemon=True)
        self._pacer.start()

    def stop(self) -> dict[str, int]:
        """Ends the producers; tells how many super-batches became what."""
        self._stopping.set()
        self._pacer.join()
        self._pool.shutdown()
        return dict(self._outcomes)

    def outcomes(self) -> dict[str, int]:
        """The same, so far."""
        with self._lock:
            return dict(self._outcomes)

    def _pace(self) -> None:
        number, due = 0, time.monotonic()
        while not self._stopping.wait(max(0.0, due - time.monotonic())):
            due += self._interval_s
            number += 1
            self._count("offered")
            if self._free.acquire(blocking=False):
                self._pool.submit(self._produce, number)
            else:
                self._count("dropped: every producer waits")

    def _produce(self, number: int) -> None:
        job, start, keys = self._jobs[number % len(self._jobs)], number % 8 * ROWS, f"new-{number}"
        give_up_at = time.monotonic() + DEADLINE_S
        try:
            while not self._stopping.is_set():
                try:
                    job.submit(self._data, start, keys)
                    self._count("taken")
                    if number % SELECTED == 0:
                        job.select(start, keys)
                        self._count("selected")
                except grpc.RpcError as error:
                    pause_s = _retry_after_s(error)
                    if pause_s is None or time.monotonic() + pause_s > give_up_at:
                        self._count(f"gave up: {error.code().name}")
                        return
                    self._count("told to come back")
                    self._stopping.wait(pause_s)
                else:
                    return
        finally:
            self._free.release()

    def _count(self, what: str) -> None:
        with self._lock:
            self._outcomes[what] += 1


def _retry_after_s(error: grpc.RpcError) -> float | None:
    """When to come back, if the server says that that helps."""
    status = rpc_status.from_call(error)
    retry = error_details_pb2.RetryInfo()
    for detail in status.details if status else ():
        if detail.Unpack(retry):
            return float(retry.retry_delay.ToNanoseconds() / 1e9)
    return None


def _watch(stack: ScoringStack, options: Options, producers: _Producers) -> list[dict[str, Any]]:
    pids = {"selector": stack.selector.pid, "queue": stack.queue.pid, "cache": stack.cache.pid}
    pids |= {"triton": stack.triton.pid}
    pids |= {f"scorer {number}": scorer.pid for number, scorer in enumerate(stack.scorers)}
    started, samples = time.monotonic(), []
    with Redis.from_url(stack.queue_url) as queue, Redis.from_url(stack.cache_url) as cache:
        while (at_s := time.monotonic() - started) < options.seconds:
            samples.append(
                {
                    "at_s": at_s,
                    "resident_bytes": {name: report.resident_bytes(pid) for name, pid in pids.items()},
                    "queue_used_bytes": queue.info("memory")["used_memory"],
                    "cache_used_bytes": cache.info("memory")["used_memory"],
                    "queued_shards": queue.zcard("{jest}:queued"),
                    "in_flight": queue.zcard("{jest}:in_flight"),
                    "taken": producers.outcomes().get("taken", 0),
                }
            )
            time.sleep(options.sample_s)
    return samples


def growth(samples: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    """The median of the last third of a run, divided by that of the third after the warm-up."""
    settled = samples[int(len(samples) * WARM_UP) :]
    third = max(1, len(settled) // 3)
    early, late = (statistics.median(map(value, part)) for part in (settled[:third], settled[-third:]))
    return late / early


def _resident(process: str, sample: dict[str, Any]) -> float:
    return float(sample["resident_bytes"][process])


def _used(server: str, sample: dict[str, Any]) -> float:
    return float(sample[f"{server}_used_bytes"])


def tables(result: dict[str, Any]) -> str:
    """Renders a result as Markdown."""
    samples = result["samples"]
    columns = {name: partial(_resident, name) for name in samples[0]["resident_bytes"]}
    columns |= {f"{name}, used": partial(_used, name) for name in ("queue", "cache")}
    rows, next_s = [], 0.0
    for sample in samples:
        if sample["at_s"] >= next_s:
            next_s += result["seconds"] / 10
            mebibytes = [f"{value(sample) / 2**20:.0f}" for value in columns.values()]
            rows.append([f"{sample['at_s']:.0f}", *mebibytes, str(sample["queued_shards"]), str(sample["in_flight"])])
    grown = [f"{growth(samples, value):.2f}×" for value in columns.values()]
    rows.append(["last third ÷ first", *grown, "–", "–"])
    outcomes = ", ".join(f"{count:,} {name}" for name, count in result["outcomes"].items())
    legend = (
        f"{result['examples_per_s']:,.0f} examples a second is what {result['scorers']} scorers and Triton take here; "
        f"{result['overload']:g} times as many were offered for {result['seconds']:g} s in super-batches of {ROWS}: "
        f"{outcomes}. {result['scored']:,} examples were embedded. MiB of resident memory, and of what Redis says it "
        f"uses; {result['stands_on']}. The last row is the median of the last third of the time after {WARM_UP:.0%} of "
        "warm-up, divided by that of the first third."
    )
    header = ["seconds", *columns, "shards queued", "in flight"]
    return f"{legend}\n\n{report.markdown(header, rows)}"
