"""Speaks the contract by hand, straight from the generated stubs: no code of the SDK or of the server is between."""

from __future__ import annotations

import itertools
import uuid
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from jest_proto.v1 import jobs_pb2, jobs_pb2_grpc, selection_pb2, selection_pb2_grpc
from jest_wire import tensors

TIMEOUT_S = 30.0
OPTIONS = [("grpc.max_receive_message_length", -1)]


@dataclass
class Refusal:
    """What a failed call said."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    fields: list[str] = field(default_factory=list)
    retry_after_s: float | None = None


def refusal_of(error: grpc.RpcError) -> Refusal:
    refusal = Refusal(error.code(), error.details())
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "jest.v1"
            refusal.reason, refusal.metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            refusal.fields = [violation.field for violation in bad.field_violations]
        elif detail.Unpack(retry):
            refusal.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return refusal


@dataclass(frozen=True)
class _Call(grpc.ClientCallDetails):
    """What gRPC has to know of a call."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Sends a token with every call, in plain text too, where gRPC's own call credentials refuse to."""

    def __init__(self, token: str) -> None:
        self._header = ("authorization", f"Bearer {token}")

    def _with_token(self, continuation: Any, call: Any, sent: Any) -> Any:
        metadata = [*(call.metadata or ()), self._header]
        return continuation(
            _Call(call.method, call.timeout, metadata, call.credentials, call.wait_for_ready, call.compression), sent
        )

    intercept_unary_unary = intercept_stream_unary = intercept_unary_stream = intercept_stream_stream = _with_token


class Speaker:
    """A client of one server; jobs it makes have names of their own and are deleted at the end."""

    def __init__(self, address: str, reference_model: str, *, channel: grpc.Channel | None = None) -> None:
        self.channel = grpc.insecure_channel(address, OPTIONS) if channel is None else channel
        self.jobs = jobs_pb2_grpc.JobServiceStub(self.channel)
        self.selection = selection_pb2_grpc.SelectionServiceStub(self.channel)
        self.reference_model = reference_model
        self._made: list[str] = []

    def close(self) -> None:
        for name in self._made:
            self.jobs.DeleteJob(jobs_pb2.DeleteJobRequest(name=name), timeout=TIMEOUT_S)
        self.channel.close()

    def job_spec(self, **overrides: Any) -> jobs_pb2.JobSpec:
        policy = jobs_pb2.SelectionPolicy(filter_ratio="0.75", num_chunks=4)
        name = f"conformance-{uuid.uuid4().hex[:12]}"
        self._made.append(name)
        fields = {"name": name, "reference_model": self.reference_model, "policy": policy, "seed": 11}
        return jobs_pb2.JobSpec(**(fields | overrides))

    def open_attempt(self, job: str, process: str, rank: int = 0, *, world_size: int = 1, **fields: Any) -> str:
        request = jobs_pb2.OpenAttemptRequest(
            job=job, rank=rank, world_size=world_size, process_nonce=process, **fields
        )
        return self.jobs.OpenAttempt(request, timeout=TIMEOUT_S).attempt

    def create_job(self, **overrides: Any) -> jobs_pb2.Job:
        request = jobs_pb2.CreateJobRequest(spec=self.job_spec(**overrides))
        return self.jobs.CreateJob(request, timeout=TIMEOUT_S).job

    def submit(
        self,
        job: str,
        super_batch_id: str,
        keys: list[str],
        *,
        rank: int = 0,
        world_size: int = 1,
        step: int | None = 0,
        **fields: Any,
    ) -> Any:
        request = selection_pb2.SubmitSuperBatchRequest(
            job=job,
            super_batch_id=super_batch_id,
            rank=rank,
            world_size=world_size,
            example_keys=keys,
            step=step,
            **fields,
        )
        return self.selection.SubmitSuperBatch(request, timeout=TIMEOUT_S)

    def upload(
        self,
        job: str,
        super_batch_id: str,
        positions: list[int],
        features: dict[str, np.ndarray],
        *,
        rank: int = 0,
        spoil: Any = None,
    ) -> Any:
        specs, buffers = tensors.encode(features)
        header = selection_pb2.UploadExamplesHeader(
            job=job, super_batch_id=super_batch_id, rank=rank, positions=positions, tensors=specs
        )
        messages = [selection_pb2.UploadExamplesRequest(header=header)]
        messages += [selection_pb2.UploadExamplesRequest(chunk=chunk) for chunk in tensors.chunks(buffers)]
        return self.selection.UploadExamples(iter(spoil(messages) if spoil else messages), timeout=TIMEOUT_S)

    def select(
        self,
        job: str,
        super_batch_id: str,
        embeddings: tuple[np.ndarray, np.ndarray],
        *,
        rank: int = 0,
        world_size: int = 1,
        scale: float = 10.0,
        bias: float = -10.0,
        timeout_s: float = TIMEOUT_S,
        spoil: Any = None,
        wait: bool = True,
        return_reference_embeddings: bool = False,
    ) -> Any:
        return self.announce(
            job,
            super_batch_id,
            {"image_embedding": embeddings[0], "text_embedding": embeddings[1]},
            timeout_s=timeout_s,
            spoil=spoil,
            wait=wait,
            rank=rank,
            world_size=world_size,
            embeddings=selection_pb2.LearnerEmbeddings(scale=scale, bias=bias),
            return_reference_embeddings=return_reference_embeddings,
        )

    def select_losses(self, job: str, super_batch_id: str, losses: dict[str, np.ndarray], **options: Any) -> Any:
        """Selects from losses of single examples, by name."""
        outputs = selection_pb2.LearnerExampleLosses()
        return self.announce(job, super_batch_id, losses, example_losses=outputs, **options)

    def select_pairs(
        self, job: str, super_batch_id: str, tiles: dict[tuple[int, int], np.ndarray], **options: Any
    ) -> Any:
        """Selects from pair losses: tiles by the row and column where they start."""
        places = [selection_pb2.PairLossTile(row=row, column=column) for row, column in tiles]
        arrays = {f"tile-{number}": tile for number, tile in enumerate(tiles.values())}
        outputs = selection_pb2.LearnerPairLosses(tiles=places)
        return self.announce(job, super_batch_id, arrays, pair_losses=outputs, **options)

    def announce(
        self,
        job: str,
        super_batch_id: str,
        arrays: dict[str, np.ndarray],
        *,
        timeout_s: float = TIMEOUT_S,
        spoil: Any = None,
        wait: bool = True,
        **header_fields: Any,
    ) -> Any:
        """Sends learner outputs of any kind and asks for the selection."""
        specs, buffers = tensors.encode(arrays)
        fields = {"rank": 0, "world_size": 1} | header_fields
        header = selection_pb2.SelectSubBatchHeader(job=job, super_batch_id=super_batch_id, tensors=specs, **fields)
        messages = [selection_pb2.SelectSubBatchRequest(header=header)]
        messages += [selection_pb2.SelectSubBatchRequest(chunk=chunk) for chunk in tensors.chunks(buffers)]
        call = self.selection.SelectSubBatch.future(iter(spoil(messages) if spoil else messages), timeout=timeout_s)
        return call.result() if wait else call

    def walk(self, job: jobs_pb2.Job, super_batch_id: str, keys: list[str], *, seed: int = 0) -> Any:
        """The whole conversation of one rank about one super-batch."""
        missing = list(self.submit(job.spec.name, super_batch_id, keys).missing_positions)
        if missing:
            self.upload(job.spec.name, super_batch_id, missing, features(job, [keys[p] for p in missing]))
        return self.select(job.spec.name, super_batch_id, unit_embeddings(len(keys), seed=seed))

    def is_well(self) -> bool:
        """Tells whether a whole conversation works now."""
        job = self.create_job()
        keys = [f"well-{i}" for i in range(16)]
        return len(self.walk(job, "well", keys).positions) == 4


def refused(call: Any, *args: Any, **kwargs: Any) -> Refusal:
    """Call what has to be refused, and return the refusal."""
    try:
        call(*args, **kwargs)
    except grpc.RpcError as error:
        return refusal_of(error)
    raise AssertionError("the call was not refused")


def unit_embeddings(rows: int, *, seed: int, width: int = 24, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    image, text = generator.standard_normal((2, rows, width))
    return tuple((m / np.linalg.norm(m, axis=1, keepdims=True)).astype(dtype) for m in (image, text))


def features(job: jobs_pb2.Job, keys: list[str]) -> dict[str, np.ndarray]:
    """Makes inputs that depend on the key alone, in the shapes that the reference model asks for."""
    arrays = {}
    for tensor in job.reference.inputs:
        shape = [7 if size == -1 else size for size in tensor.shape]
        dtype = tensors.DATATYPES[tensor.datatype].numpy
        rows = []
        for key in keys:
            generator = np.random.default_rng(list(key.encode()))
            rows.append(generator.integers(0, 100, shape).astype(dtype))
        arrays[tensor.name] = np.stack(rows)
    return arrays


_unique = itertools.count()


def fresh_keys(rows: int) -> list[str]:
    """Keys that no cache has seen."""
    mark = f"{uuid.uuid4().hex[:8]}-{next(_unique)}"
    return [f"{mark}-{row}" for row in range(rows)]
