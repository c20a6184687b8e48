"""The ranks of a training job as the selector sees them: processes of their own that call it at the same moment.

They speak the contract's stubs directly and hold NumPy arrays, so that what is measured is the contract and the server.
"""

from __future__ import annotations

import multiprocessing
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import grpc

from jest_proto.v1 import selection_pb2, selection_pb2_grpc
from jest_wire.learner_outputs import IMAGE_EMBEDDING, TEXT_EMBEDDING
from jest_wire.tensors import chunks, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

    import numpy.typing as npt

TIMEOUT_S = 300.0
EXIT_TIMEOUT_S = 5.0
STEP = 0
"""Of every super-batch: it seeds the selection."""
STAGES = ("wait_learner", "wait_reference", "queue", "compute")


@dataclass(frozen=True, eq=False)
class Rank:
    """One rank's part of a super-batch, which it sends again and again under other ids."""

    address: str
    job: str
    rank: int
    world_size: int
    keys: tuple[str, ...]
    image: npt.NDArray[Any]
    text: npt.NDArray[Any]
    scale: float
    bias: float


@dataclass(frozen=True)
class Call:
    """What one call of SelectSubBatch was like; times in seconds."""

    positions: tuple[int, ...]
    total: float
    """From tensors in hand to the answer."""
    encoded: float
    """Of these, until the tensors were announced: their checksums."""
    sent: float
    """Of these, until gRPC had taken the last chunk."""
    stages: dict[str, float]
    """As the server says, the same for all ranks."""
    sent_bytes: int


class RankProcesses:
    """All ranks of a job, one process and one channel each, for the length of a block.

    A rank shares nothing with the others but its pipe to this process, so that a rank that is killed at any moment
    cannot hold a lock that the others need.
    """

    def __init__(self, ranks: Sequence[Rank]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in ranks:
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(rank, theirs), name=f"rank {rank.rank}", daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # a rank that waits for its next step returns
        for process in self._processes:
            process.join(EXIT_TIMEOUT_S)
            process.kill()  # a handler of SIGTERM can hang: coverage's does in a process that is just exiting
            process.join()

    def select(self, super_batch_id: str) -> list[Call]:
        """Submit on all ranks, then call SelectSubBatch on all at once; in the order of the ranks.

        Raises:
            RuntimeError: If a rank failed; its own message is in it.
        """
        self._on_all(_submit, super_batch_id)
        return [answer for answer in self._on_all(_select, super_batch_id) if isinstance(answer, Call)]

    def _on_all(self, step: Callable[..., Call | None], super_batch_id: str) -> list[Call | str | None]:
        for pipe in self._pipes:
            with suppress(OSError):  # its process ended, as its answer will say
                pipe.send((step, super_batch_id))
        answers = [_answer(pipe) for pipe in self._pipes]
        failures = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if isinstance(answer, str)]
        if failures:
            raise RuntimeError(f"super-batch {super_batch_id!r} failed: {'; '.join(failures)}")
        return answers


def _answer(pipe: Connection) -> Call | str | None:
    try:
        answer: Call | str | None = pipe.recv()
    except (EOFError, OSError):
        return "its process ended"
    return answer


def _run(rank: Rank, pipe: Connection) -> None:
    """Run one rank's process: take each step that arrives and answer it, until the pipe is closed."""
    with grpc.insecure_channel(rank.address) as channel, suppress(EOFError, OSError):
        stub = selection_pb2_grpc.SelectionServiceStub(channel)
        while True:
            step, super_batch_id = pipe.recv()
            try:
                answer: Call | str | None = step(stub, rank, super_batch_id)
            except Exception as error:  # noqa: BLE001 - any failure goes to the parent, which ends the selection
                answer = _sentence(error)
            pipe.send(answer)


def _sentence(error: Exception) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.RpcError) else repr(error)


def _submit(stub: selection_pb2_grpc.SelectionServiceStub, rank: Rank, super_batch_id: str) -> None:
    request = selection_pb2.SubmitSuperBatchRequest(
        job=rank.job,
        super_batch_id=super_batch_id,
        rank=rank.rank,
        world_size=rank.world_size,
        example_keys=rank.keys,
        step=STEP,
    )
    missing = stub.SubmitSuperBatch(request, timeout=TIMEOUT_S).missing_positions
    assert not missing, f"{len(missing)} rows are not in the reference cache"


def _select(stub: selection_pb2_grpc.SelectionServiceStub, rank: Rank, super_batch_id: str) -> Call:
    started = time.perf_counter()
    specs, buffers = encode({IMAGE_EMBEDDING: rank.image, TEXT_EMBEDDING: rank.text})
    encoded = sent = time.perf_counter()
    header = selection_pb2.SelectSubBatchHeader(
        job=rank.job,
        super_batch_id=super_batch_id,
        rank=rank.rank,
        world_size=rank.world_size,
        embeddings=selection_pb2.LearnerEmbeddings(scale=rank.scale, bias=rank.bias),
        tensors=specs,
    )

    def messages() -> Iterator[selection_pb2.SelectSubBatchRequest]:
        nonlocal sent
        yield selection_pb2.SelectSubBatchRequest(header=header)
        for chunk in chunks(buffers):
            yield selection_pb2.SelectSubBatchRequest(chunk=chunk)
        sent = time.perf_counter()

    answer = stub.SelectSubBatch(messages(), timeout=TIMEOUT_S)
    ended = time.perf_counter()
    return Call(
        positions=tuple(answer.positions),
        total=ended - started,
        encoded=encoded - started,
        sent=sent - encoded,
        stages={name: getattr(answer.timings, name).ToNanoseconds() / 1e9 for name in STAGES},
        sent_bytes=sum(buffer.nbytes for buffer in buffers),
    )
