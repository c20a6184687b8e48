"""What it costs to have a selection made by the server: SelectSubBatch over loopback against the same in process.

Run it with `python -m jest_bench rpc`. The selector and every rank are processes of their own; the reference embeddings
are cached beforehand, so that nothing but the call is measured. Both sides take turns and must choose the same rows.
"""

from __future__ import annotations

import math
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import grpc
import torch

from jest_bench import report
from jest_bench.health import HealthProbe
from jest_bench.problem import super_batch
from jest_bench.ranks import STAGES, STEP, Rank, RankProcesses
from jest_bench.served import selector
from jest_core import Embeddings, SelectionPolicy, select_sub_batch, selection_seed
from jest_proto.v1 import jobs_pb2, jobs_pb2_grpc
from jest_server.domain.references import ReferenceInfo
from jest_server.selector.learner_outputs.header import LEARNER_DATATYPES
from jest_wire.tensors import DATATYPES, as_numpy, encode

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from jest_bench.ranks import Call

REFERENCE_NAME = "bench"
SEED = 5
KEPT = 5
"""One row in so many is chosen, as at the published filter ratio of 0.8."""
CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Options:
    """What to measure."""

    rows: int = 8192
    width: int = 512
    datatype: str = "FP16"
    ranks: tuple[int, ...] = (1, 2, 8)
    num_chunks: int = 16
    runs: int = 5

    def __post_init__(self) -> None:
        if self.datatype not in LEARNER_DATATYPES:
            raise ValueError(f"datatype is {self.datatype!r}, expected one of {', '.join(LEARNER_DATATYPES)}")
        for name, values in (("ranks", self.ranks or (0,)), ("runs", (self.runs,)), ("width", (self.width,))):
            if min(values) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected numbers of at least 1")
        if self.sub_batch_size < self.num_chunks:
            raise ValueError(
                f"rows ({self.rows}) leave a sub-batch of {self.sub_batch_size} that the ranks share evenly, "
                f"expected at least num_chunks ({self.num_chunks})"
            )

    @property
    def sub_batch_size(self) -> int:
        """As many rows as every number of ranks can share evenly, and a fifth of all at most."""
        shared = math.lcm(*self.ranks)
        return self.rows // KEPT // shared * shared

    @property
    def policy(self) -> SelectionPolicy:
        """The published method."""
        return SelectionPolicy(sub_batch_size=self.sub_batch_size, num_chunks=self.num_chunks)


@dataclass(frozen=True, eq=False)
class Problem:
    """One super-batch, as both sides get it: learner in the wire's datatype, reference as it is cached."""

    learner: Embeddings
    reference: Embeddings
    keys: list[str]
    options: Options

    def info(self) -> ReferenceInfo:
        """Returns what a scorer would say of the reference model."""
        return ReferenceInfo(
            name=REFERENCE_NAME,
            version="1",
            preprocessing_id="none",
            scale=self.reference.scale,
            bias=self.reference.bias,
            embedding_width=self.reference.image.shape[1],
            inputs=(),
        )

    def cached(self) -> dict[str, bytes]:
        """Returns the reference embeddings as the cache holds them."""
        values = torch.stack([self.reference.image, self.reference.text], dim=1).numpy()
        return {key: row.tobytes() for key, row in zip(self.keys, values, strict=True)}

    def in_process(self, world_size: int) -> list[int]:
        """Chooses here what the server chooses for so many ranks; arrays are checked and cast as it does."""
        learner, reference = (
            Embeddings(model.image, model.text, model.scale, model.bias) for model in (self.learner, self.reference)
        )
        starts = _starts(len(learner), world_size)
        rank_of_row = torch.bucketize(torch.arange(len(learner)), torch.tensor(starts[1:]), right=True)
        seed = selection_seed(SEED, STEP)
        chosen = select_sub_batch(
            learner, reference, self.options.policy, seed=seed, example_keys=self.keys, rank_of_row=rank_of_row
        )
        return list(chosen.positions.tolist())

    def ranks(self, address: str, job: str, world_size: int) -> list[Rank]:
        """Cuts the learner's side into the ranks' parts."""
        specs, buffers = encode({"image": self.learner.image, "text": self.learner.text})
        image, text = (as_numpy(spec, data) for spec, data in zip(specs, buffers, strict=True))
        starts = _starts(len(self.keys), world_size)
        return [
            Rank(
                address=address,
                job=job,
                rank=rank,
                world_size=world_size,
                keys=tuple(self.keys[start:stop]),
                image=image[start:stop],
                text=text[start:stop],
                scale=self.learner.scale,
                bias=self.learner.bias,
            )
            for rank, (start, stop) in enumerate(pairwise(starts))
        ]


def problem(options: Options) -> Problem:
    """Makes the super-batch."""
    batch = super_batch(options.rows, options.width)
    learner_dtype = getattr(torch, DATATYPES[options.datatype].torch)
    learner, reference = (
        Embeddings(model.image.to(dtype), model.text.to(dtype), model.scale, model.bias)
        for model, dtype in ((batch.learner, learner_dtype), (batch.reference, torch.float16))
    )
    return Problem(learner, reference, [f"example-{row}" for row in range(options.rows)], options)


def measure(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures everything; ``say`` is told what is being done.

    Raises:
        RuntimeError: If a call fails, or the server chooses other rows than are chosen in process.
        ServerStartError: If the selector does not come up.
    """
    asked = problem(options)
    # The same circumstances as the server's: one thread that computes, beside one that waits.
    with selector(asked.info(), asked.cached()) as served, ThreadPoolExecutor(1) as here:
        say(f"selector on {served.address}, {served.stands_on}")
        results = []
        for world_size in options.ranks:
            say(f"ranks: {world_size}")
            results.append(_measure(asked, served.address, world_size, here))
    return {
        "benchmark": "rpc",
        "machine": report.machine(),
        "stands_on": served.stands_on,
        "rows": options.rows,
        "sub_batch": options.sub_batch_size,
        "width": options.width,
        "datatype": options.datatype,
        "num_chunks": options.num_chunks,
        "runs": options.runs,
        "ranks": results,
    }


def tables(result: dict[str, Any]) -> str:
    """Renders a result as Markdown."""
    header = ["ranks", "in process", "SelectSubBatch", "ratio", *STAGES, "rest", "encode", "send", "received MB"]
    header += ["worst health ms", "oversleep ms"]
    rows = [
        [
            str(row["ranks"]),
            *(f"{row[name]:.3f}" for name in ("in_process_s", "rpc_s")),
            f"{row['ratio']:.2f}×",
            *(f"{row['stages_s'][name]:.3f}" for name in STAGES),
            *(f"{row[name]:.3f}" for name in ("rest_s", "encode_s", "send_s")),
            f"{row['received_bytes'] / 1e6:.1f}",
            *(f"{row[name] * 1e3:.0f}" for name in ("worst_health_s", "worst_oversleep_s")),
        ]
        for row in result["ranks"]
    ]
    legend = (
        f"B = {result['rows']:,}, b = {result['sub_batch']:,}, D = {result['width']}, {result['datatype']}, "
        f"{result['num_chunks']} chunks; {result['stands_on']}. Medians of {result['runs']} runs, each the slowest "
        "rank's; seconds but where said otherwise. `rest` is the call without the server's stages: from the ranks' "
        "start until the first one's tensors were there, and from the end of the computation to the answer, recording "
        "included; `encode` and `send` are a rank's own part in it. Health was asked for every 10 ms during the calls; "
        "`oversleep` is how much too late the machine woke the one who asked, at worst."
    )
    return f"{legend}\n\n{report.markdown(header, rows)}"


def create_job(address: str, name: str, options: Options, world_size: int) -> None:
    """Registers a job whose ranks choose as ``Problem.in_process`` does."""
    spec = jobs_pb2.JobSpec(
        name=name,
        reference_model=REFERENCE_NAME,
        policy=jobs_pb2.SelectionPolicy(sub_batch_size=options.sub_batch_size, num_chunks=options.num_chunks),
        world_size=world_size,
        seed=SEED,
    )
    with grpc.insecure_channel(address) as channel:
        jobs_pb2_grpc.JobServiceStub(channel).CreateJob(jobs_pb2.CreateJobRequest(spec=spec), timeout=CALL_TIMEOUT_S)


def _measure(asked: Problem, address: str, world_size: int, thread: Executor) -> dict[str, Any]:
    job = f"bench-{world_size}"
    create_job(address, job, asked.options, world_size)
    in_process_s, calls = [], []
    latencies_s: list[float] = []
    oversleeps_s: list[float] = []
    with RankProcesses(asked.ranks(address, job, world_size)) as processes:
        for turn in range(asked.options.runs + 1):
            super_batch_id = f"turn-{turn}"
            started = time.perf_counter()
            here = thread.submit(asked.in_process, world_size).result()
            elapsed_s = time.perf_counter() - started
            with HealthProbe(address) as health:
                there = processes.select(super_batch_id)
            _require_same(here, there, len(asked.keys))
            if turn:
                in_process_s.append(elapsed_s)
                calls.append(max(there, key=lambda call: call.total))
                latencies_s += health.latencies_s
                oversleeps_s += health.oversleeps_s
    rpc_s = statistics.median(call.total for call in calls)
    here_s = statistics.median(in_process_s)
    return {
        "ranks": world_size,
        "in_process_s": here_s,
        "rpc_s": rpc_s,
        "ratio": rpc_s / here_s,
        "stages_s": {name: statistics.median(call.stages[name] for call in calls) for name in STAGES},
        "rest_s": statistics.median(call.total - sum(call.stages.values()) for call in calls),
        "encode_s": statistics.median(call.encoded for call in calls),
        "send_s": statistics.median(call.sent for call in calls),
        "received_bytes": sum(call.sent_bytes for call in there),
        "worst_health_s": max(latencies_s, default=0.0),
        "median_health_s": statistics.median(latencies_s or [0.0]),
        "worst_oversleep_s": max(oversleeps_s, default=0.0),
        "runs": {"in_process_s": in_process_s, "rpc_s": [call.total for call in calls]},
    }


def _require_same(here: list[int], there: list[Call], rows: int) -> None:
    starts = _starts(rows, len(there))
    theirs = {start + position for start, call in zip(starts, there, strict=False) for position in call.positions}
    if theirs != set(here):
        raise RuntimeError(
            f"the server chose {len(theirs)} rows of which {len(theirs & set(here))} are among the {len(here)} chosen "
            "in process: times of different selections cannot be compared"
        )


def _starts(rows: int, world_size: int) -> list[int]:
    """Returns where the rows of each rank start, and where the last one's end."""
    return [rank * rows // world_size for rank in range(world_size + 1)]
