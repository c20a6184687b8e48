"""Training jobs as the server sees them: whole conversations over gRPC, by the contract's stubs.

Features and learner embeddings are made up, so that a job costs next to nothing of its own.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from jest_proto.v1 import jobs_pb2, jobs_pb2_grpc, selection_pb2, selection_pb2_grpc
from jest_wire.learner_outputs import IMAGE_EMBEDDING, TEXT_EMBEDDING
from jest_wire.tensors import DATATYPES, chunks, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

TIMEOUT_S = 1800.0
LEARNER_WIDTH = 32
KEPT = 5
"""One row in so many is chosen."""
LARGEST_TOKEN = 100
ANY_LENGTH = 16
"""What an input's dimension of any length is here."""


@dataclass(frozen=True, eq=False)
class DataSet:
    """Examples that jobs train on: what the reference model takes, by input name, ``[n, ...]``."""

    features: dict[str, npt.NDArray[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))

    @classmethod
    def random(cls, inputs: Sequence[jobs_pb2.ReferenceInput], examples: int, *, seed: int = 0) -> DataSet:
        """Makes examples of the shapes and datatypes that the reference model asks for."""
        draw = np.random.default_rng(seed)
        features = {}
        for entry in inputs:
            shape = (examples, *(ANY_LENGTH if size == -1 else size for size in entry.shape))
            dtype = DATATYPES[entry.datatype].numpy
            whole = np.issubdtype(dtype, np.integer)
            features[entry.name] = (
                draw.integers(0, LARGEST_TOKEN, shape).astype(dtype) if whole else draw.random(shape, dtype=np.float32)
            )
        return cls(features)


@dataclass(frozen=True)
class Run:
    """What became of a job."""

    seconds: float
    cache_hits: int
    reference_inferences: int


class BenchJob:
    """A job of one rank that goes through a data set once, some super-batches at a time."""

    def __init__(self, address: str, name: str, *, rows: int, at_a_time: int, ttl_s: int = 1800) -> None:
        self._channel = grpc.insecure_channel(address)
        self._selection = selection_pb2_grpc.SelectionServiceStub(self._channel)
        self._jobs = jobs_pb2_grpc.JobServiceStub(self._channel)
        self._name = name
        self._rows = rows
        self._at_a_time = at_a_time
        spec = jobs_pb2.JobSpec(
            name=name,
            reference_model="jest_reference",
            policy=jobs_pb2.SelectionPolicy(sub_batch_size=max(1, rows // KEPT), num_chunks=1),
            max_in_flight=at_a_time,
        )
        spec.reference_timeout.FromSeconds(int(TIMEOUT_S))
        spec.super_batch_ttl.FromSeconds(ttl_s)
        self.job = self._jobs.CreateJob(jobs_pb2.CreateJobRequest(spec=spec), timeout=TIMEOUT_S).job

    def train(self, data: DataSet, *, keys: str = "example") -> Run:
        """Has all super-batches of the data set selected; example i is called ``KEYS-i``.

        Raises:
            grpc.RpcError: If a call failed.
        """
        started = time.perf_counter()
        starts = range(0, len(data) - self._rows + 1, self._rows)
        with ThreadPoolExecutor(self._at_a_time) as pool:
            answers = list(pool.map(lambda start: self._converse(data, start, keys), starts))
        return Run(
            time.perf_counter() - started,
            sum(answer.cache_hits for answer in answers),
            sum(answer.reference_inferences for answer in answers),
        )

    def close(self) -> None:
        """Deletes the job."""
        self._jobs.DeleteJob(jobs_pb2.DeleteJobRequest(name=self._name), timeout=TIMEOUT_S)
        self._channel.close()

    def _converse(self, data: DataSet, start: int, keys: str) -> selection_pb2.SelectSubBatchResponse:
        self.submit(data, start, keys)
        return self.select(start, keys)

    def submit(self, data: DataSet, start: int, keys: str) -> None:
        """Submits the super-batch that starts at this row, and uploads what is missing."""
        ids: dict[str, Any] = {"job": self._name, "super_batch_id": f"{keys}-{start}"}
        request = selection_pb2.SubmitSuperBatchRequest(
            **ids, rank=0, world_size=1, step=start, example_keys=[f"{keys}-{start + row}" for row in range(self._rows)]
        )
        missing = list(self._selection.SubmitSuperBatch(request, timeout=TIMEOUT_S).missing_positions)
        if missing:
            rows = {name: array[start : start + self._rows][missing] for name, array in data.features.items()}
            specs, buffers = encode(rows)
            upload = selection_pb2.UploadExamplesHeader(**ids, positions=missing, tensors=specs)
            self._selection.UploadExamples(
                _stream(selection_pb2.UploadExamplesRequest, upload, buffers), timeout=TIMEOUT_S
            )

    def select(self, start: int, keys: str) -> selection_pb2.SelectSubBatchResponse:
        """Has a submitted super-batch selected."""
        ids: dict[str, Any] = {"job": self._name, "super_batch_id": f"{keys}-{start}"}
        learner = np.eye(self._rows, LEARNER_WIDTH, dtype=np.float32)
        specs, buffers = encode({IMAGE_EMBEDDING: learner, TEXT_EMBEDDING: learner})
        outputs = selection_pb2.LearnerEmbeddings(scale=1.0, bias=0.0)
        header = selection_pb2.SelectSubBatchHeader(**ids, rank=0, world_size=1, embeddings=outputs, tensors=specs)
        return self._selection.SelectSubBatch(
            _stream(selection_pb2.SelectSubBatchRequest, header, buffers), timeout=TIMEOUT_S
        )


def _stream(message: Any, header: Any, buffers: Any) -> Iterator[Any]:
    yield message(header=header)
    for chunk in chunks(buffers):
        yield message(chunk=chunk)
