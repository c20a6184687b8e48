"""A server that speaks jest.v1 on a real port and misbehaves to order.

Unless the script of a method says otherwise it is honest and simple. It remembers keys it was given features for, wants
the others uploaded unless the job has no reference model, waits for all ranks, and chooses each rank's best rows, no
more of a group than the policy allows: those of largest image embedding in the first dimension, or of the largest sum
of pair losses, or of the largest learner loss beyond the reference's. What learners sent is kept in `outputs`. Run as
a program it prints its port and serves until it is killed.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from concurrent import futures
from dataclasses import dataclass, field

import grpc
import numpy as np
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from jest_core import Schedule
from jest_proto.v1 import jobs_pb2, jobs_pb2_grpc, tensors_pb2
from jest_proto.v1 import selection_pb2 as pb
from jest_proto.v1 import selection_pb2_grpc as pb_grpc
from jest_wire.tensors import Assembler, TensorChecksumError, as_numpy, encode

REFERENCE = jobs_pb2.ReferenceModel(
    name="reference",
    version="7",
    preprocessing_id="p1",
    scale=10.0,
    bias=-5.0,
    embedding_width=3,
    inputs=[
        jobs_pb2.ReferenceInput(name="image", datatype="UINT8", shape=[3, -1, -1]),
        jobs_pb2.ReferenceInput(name="tokens", datatype="INT32", shape=[4]),
    ],
)


def fail(code, reason=None, message="no", *, retry_after_s=None, metadata=None, violations=None):
    """An action that refuses the call, with details if there is a reason."""

    def act(context):
        details = []
        if reason is not None:
            details.append(error_details_pb2.ErrorInfo(reason=reason, domain="jest.v1", metadata=metadata or {}))
        if retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(retry_after_s * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        if violations:
            items = [error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in violations.items()]
            details.append(error_details_pb2.BadRequest(field_violations=items))
        if details:
            status = status_pb2.Status(code=code.value[0], message=message)
            for detail in details:
                packed = any_pb2.Any()
                packed.Pack(detail)
                status.details.append(packed)
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(code, message)

    return act


def hold(released):
    """An action that keeps the call until an event is set or the caller has gone, then goes on."""

    def act(context):
        while context.is_active() and not released.wait(0.01):
            pass

    return act


def proceed(context):
    """An action that changes nothing."""


@dataclass
class Seen:
    """One call as it arrived, also if it was refused."""

    method: str
    request: object
    metadata: dict
    at: float = field(default_factory=time.monotonic)


class ScriptedServer(pb_grpc.SelectionServiceServicer, jobs_pb2_grpc.JobServiceServicer):
    def __init__(self, port=0, *, cached=(), credentials=None):
        self.script = defaultdict(deque)
        self.seen = []
        self.jobs = {}
        self.features = {}  # key -> input name -> bytes of the row
        self.cached = set(cached)
        self.answers = {}  # fields to add to SelectSubBatch's answers
        self.dead = set()
        self.submissions = {}  # (job, super-batch, rank) -> request
        self.outputs = {}  # (super-batch, rank) -> name of the tensor or "pair_losses" -> array
        self._changed = threading.Condition()
        self._rows = defaultdict(dict)
        self._executor = futures.ThreadPoolExecutor(max_workers=16)
        self._server = grpc.server(self._executor, options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_SelectionServiceServicer_to_server(self, self._server)
        jobs_pb2_grpc.add_JobServiceServicer_to_server(self, self._server)
        address = f"127.0.0.1:{port}"
        port = (
            self._server.add_insecure_port(address)
            if credentials is None
            else self._server.add_secure_port(address, credentials)
        )
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def stop(self):
        self._server.stop(0).wait()
        self._executor.shutdown()

    def wait(self):
        self._server.wait_for_termination()

    def count(self, method):
        return sum(call.method == method for call in self.seen)

    def requests(self, method):
        return [call.request for call in self.seen if call.method == method]

    def evict(self):
        self.cached.clear()

    def _arrived(self, method, request, context):
        with self._changed:
            self.seen.append(Seen(method, request, dict(context.invocation_metadata())))
            script = self.script[method]
            action = script.popleft() if script else proceed
            self._changed.notify_all()
        action(context)

    def CreateJob(self, request, context):
        self._arrived("CreateJob", request, context)
        created = request.spec.name not in self.jobs
        self.jobs.setdefault(request.spec.name, request.spec)
        return jobs_pb2.CreateJobResponse(job=self._job(request.spec.name), created=created)

    def OpenAttempt(self, request, context):
        self._arrived("OpenAttempt", request, context)
        return jobs_pb2.OpenAttemptResponse(attempt=f"a{self.count('OpenAttempt')}")

    def GetJob(self, request, context):
        self._arrived("GetJob", request, context)
        if request.name not in self.jobs:
            fail(grpc.StatusCode.NOT_FOUND, "JOB_UNKNOWN", f"job {request.name!r} does not exist; create it first")(
                context
            )
        return jobs_pb2.GetJobResponse(job=self._job(request.name))

    def DeleteJob(self, request, context):
        self._arrived("DeleteJob", request, context)
        return jobs_pb2.DeleteJobResponse(deleted=self.jobs.pop(request.name, None) is not None)

    def GetServerInfo(self, request, context):
        self._arrived("GetServerInfo", request, context)
        return pb.GetServerInfoResponse(
            version="1.2.3",
            scorings=[jobs_pb2.SCORING_LEARNABILITY, jobs_pb2.SCORING_HARD_LEARNER],
            losses=[jobs_pb2.LOSS_SIGMOID, jobs_pb2.LOSS_PER_EXAMPLE],
            learner_datatypes=["FP32"],
            max_rows_per_rank=10,
            max_tensor_bytes=1 << 30,
            max_message_bytes=4 << 20,
            max_world_size=8,
            max_pair_loss_bytes=1 << 33,
            precisions=[jobs_pb2.PRECISION_FLOAT32, jobs_pb2.PRECISION_BFLOAT16],
        )

    def SubmitSuperBatch(self, request, context):
        self._arrived("SubmitSuperBatch", request, context)
        name = (request.job, request.super_batch_id, request.rank)
        if request.super_batch_id in self.dead:
            fail(grpc.StatusCode.ABORTED, "DEAD_LETTERED", "it was dead-lettered: EXPIRED")(context)
        if self.submissions.setdefault(name, request) != request:
            fail(grpc.StatusCode.ALREADY_EXISTS, "SUPER_BATCH_CONFLICT", "submitted before with other keys")(context)
        if not self.jobs[request.job].reference_model:
            return pb.SubmitSuperBatchResponse()
        first = {}
        for row, key in enumerate(request.example_keys):
            first.setdefault(key, row)
        missing = [row for key, row in first.items() if key not in self.cached]
        return pb.SubmitSuperBatchResponse(missing_positions=missing, reference=REFERENCE)

    def UploadExamples(self, messages, context):
        header = next(messages).header
        self._arrived("UploadExamples", header, context)
        tensors = _received(header.tensors, messages, context)
        keys = self.submissions[header.job, header.super_batch_id, header.rank].example_keys
        for row, position in enumerate(header.positions):
            self.features[keys[position]] = {name: array[row].tobytes() for name, array in tensors.items()}
            self.cached.add(keys[position])
        return pb.UploadExamplesResponse(accepted=len(header.positions))

    def SelectSubBatch(self, messages, context):
        header = next(messages).header
        self._arrived("SelectSubBatch", header, context)
        tensors = _received(header.tensors, messages, context)
        submission = self.submissions.get((header.job, header.super_batch_id, header.rank))
        if submission is None:
            fail(grpc.StatusCode.NOT_FOUND, "SUPER_BATCH_UNKNOWN", "submit it first")(context)
        spec, rows = self.jobs[header.job], len(submission.example_keys)
        if spec.reference_model and not self.cached.issuperset(submission.example_keys):
            fail(grpc.StatusCode.FAILED_PRECONDITION, "REFERENCE_MISSING", "submit again")(context)
        if header.super_batch_id in self.dead:
            fail(grpc.StatusCode.ABORTED, "DEAD_LETTERED", "it was dead-lettered: MODEL_ERROR")(context)
        rows_of_ranks = self._rows[header.job, header.super_batch_id]
        with self._changed:
            rows_of_ranks[header.rank] = rows
            self._changed.notify_all()
            while len(rows_of_ranks) < header.world_size and context.is_active():
                self._changed.wait(0.01)
        if header.WhichOneof("outputs") == "pair_losses":
            tensors = {"pair_losses": _matrix(header, tensors, rows, sum(rows_of_ranks.values()))}
        self.outputs[header.super_batch_id, header.rank] = tensors
        positions = _best(_scores(tensors, rows), submission.group_labels, spec, submission.step)
        answer = pb.SelectSubBatchResponse(
            positions=positions,
            sub_batch_size=len(positions) * header.world_size,
            super_batch_size=sum(rows_of_ranks.values()),
            reference_version=REFERENCE.version,
            cache_hits=1,
            reference_inferences=2,
            perplexity=[4.0, 2.0],
            weights=[2 * (len(positions) - i) / (len(positions) + 1) for i in range(len(positions))]
            if spec.policy.weights
            else [],
            gain=_at(spec.policy.gain_schedule, submission.step)
            if spec.policy.HasField("gain_schedule")
            else spec.policy.gain,
        )
        answer.timings.compute.FromMilliseconds(250)
        if header.return_reference_embeddings:
            rows = np.asarray(positions, np.float16)[:, None] * np.ones((1, 3), np.float16)
            specs, buffers = encode({"image_embedding": rows, "text_embedding": -rows})
            answer.reference_embeddings.extend(
                tensors_pb2.Tensor(spec=s, data=b.tobytes()) for s, b in zip(specs, buffers, strict=True)
            )
        answer.MergeFrom(pb.SelectSubBatchResponse(**self.answers))
        return answer

    def _job(self, name):
        return jobs_pb2.Job(
            spec=self.jobs[name],
            reference=REFERENCE if self.jobs[name].reference_model else None,
            counters=jobs_pb2.JobCounters(submitted=5, selected=2, dead_lettered=1, in_flight=2, examples_loaded=99),
        )


def _scores(tensors, rows):
    if "pair_losses" in tensors:
        return tensors["pair_losses"].astype(np.float64).sum(1)
    if "image_embedding" in tensors:
        return tensors["image_embedding"][:, 0].astype(np.float64)
    nothing = np.zeros(rows)
    return tensors.get("learner_loss", nothing).astype(np.float64) - tensors.get("reference_loss", nothing)


def _best(scores, labels, spec, step):
    """The share of a rank, best first, no more of a group than the policy allows."""
    policy, taken, positions = spec.policy, defaultdict(int), []
    for row in np.argsort(-scores, kind="stable").tolist():
        label = labels[row] if labels else ""
        if label and policy.max_per_group and taken[label] == policy.max_per_group:
            continue
        taken[label] += 1
        positions.append(row)
    return positions[: _share(spec, len(scores), step)]


def _share(spec, rows, step):
    size = spec.policy.WhichOneof("size")
    if size == "sub_batch_size":
        return spec.policy.sub_batch_size // spec.world_size
    ratio = (
        _at(spec.policy.filter_ratio_schedule, step) if size == "filter_ratio_schedule" else spec.policy.filter_ratio
    )
    return round(rows * (1 - float(ratio)))


def _at(schedule, step):
    shape = jobs_pb2.Schedule.Shape.Name(schedule.shape).removeprefix("SHAPE_").lower()
    ends = {name: getattr(schedule, name) for name in ("end", "steps") if schedule.HasField(name)}
    return Schedule(shape=shape, start=schedule.start, warmup_steps=schedule.warmup_steps, **ends).at(step)


def _matrix(header, tensors, rows, columns):
    """A rank's pair losses out of their tiles; what no tile covers stays NaN."""
    matrix = np.full((rows, columns), np.nan)
    for place, spec in zip(header.pair_losses.tiles, header.tensors, strict=True):
        height, width = spec.shape
        matrix[place.row : place.row + height, place.column : place.column + width] = tensors[spec.name]
    return matrix


def _received(specs, messages, context):
    assembler = Assembler(specs, max_bytes=1 << 30)
    for message in messages:
        assembler.add(message.chunk)
    try:
        buffers = assembler.finish()
    except TensorChecksumError as error:
        fail(grpc.StatusCode.DATA_LOSS, "CHECKSUM_MISMATCH", str(error), retry_after_s=0.0)(context)
    return {spec.name: as_numpy(spec, data) for spec, data in zip(specs, buffers, strict=True)}


if __name__ == "__main__":
    server = ScriptedServer()
    print(server.port, flush=True)  # noqa: T201 - how the parent learns the port
    server.wait()
