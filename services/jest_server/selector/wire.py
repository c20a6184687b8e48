"""The contract's messages to the server's values and back; unset fields take the contract's defaults."""

from __future__ import annotations

import re
import reprlib
from typing import TYPE_CHECKING, Any, Final, get_args

import torch
from pydantic import TypeAdapter, ValidationError

from jest_core.policy import Loss, Precision, Scoring
from jest_proto.v1 import jobs_pb2 as pb
from jest_proto.v1 import selection_pb2, tensors_pb2
from jest_server import __version__
from jest_server.domain import tenants
from jest_server.domain.attempts import AttemptRequest
from jest_server.domain.errors import InvalidField
from jest_server.domain.jobs import JobName, JobSpec
from jest_server.domain.super_batches import RankRef, Submission, SuperBatchId, SuperBatchRef
from jest_server.selector.intake.uploads import UploadRequest
from jest_server.selector.learner_outputs.header import LEARNER_DATATYPES
from jest_server.selector.learner_outputs.request import SelectRequest
from jest_wire.learner_outputs import EMBEDDINGS
from jest_wire.policies import values_from_wire, values_to_wire
from jest_wire.tensors import encode
from jest_wire.values import FieldError, duration, enum_name, enum_value, seconds, timestamp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from jest_server.domain.jobs import Counters, Job
    from jest_server.domain.references import ReferenceInfo
    from jest_server.runtime.settings import SelectorSettings
    from jest_server.selector.intake.submit import Accepted
    from jest_server.selector.learner_outputs.pending_selections import Outcome

MAX_LAUNCH_BYTES: Final = 128
_ATTEMPT_FIELDS: Final = (
    ("process_nonce", r"[A-Za-z0-9_-]{1,64}", "1 to 64 characters of [A-Za-z0-9_-]"),
    ("parent", r"(a[1-9][0-9]{0,17})?", "an attempt as OpenAttempt named it, or nothing"),
)
LONGEST_PHASE_S: Final = 3600.0
"""A longer phase of a trainer's step counts as this long."""
DEFAULT_PAGE: Final = 100
LARGEST_PAGE: Final = 1000
_JOB_NAME: TypeAdapter[str] = TypeAdapter(JobName)
_SUPER_BATCH_ID: TypeAdapter[str] = TypeAdapter(SuperBatchId)
_OPTIONAL: Final = ("world_size", "max_in_flight", "weight")


def job_name_from_wire(name: str, field: str) -> str:
    """Return the name under which the server knows the caller's job.

    Raises:
        InvalidField: If it is not a valid name.
    """
    return tenants.scoped(_checked(_JOB_NAME, name, field))


def page_size_from_wire(request: pb.ListJobsRequest) -> int:
    """Return how many jobs a page holds.

    Raises:
        InvalidField: If the size is out of range.
    """
    size: int = request.page_size if request.HasField("page_size") else DEFAULT_PAGE
    if not 1 <= size <= LARGEST_PAGE:
        raise InvalidField(f"page_size is {size}, expected 1 to {LARGEST_PAGE}", field_name="page_size")
    return size


def job_spec_from_wire(message: pb.JobSpec) -> JobSpec:
    """Return a job's spec.

    Raises:
        InvalidField: For the first field that is invalid.
    """
    spec: dict[str, Any] = {
        "name": job_name_from_wire(message.name, "spec.name"),
        "reference_model": message.reference_model,
        "seed": message.seed,
    }
    spec |= {field: getattr(message, field) for field in _OPTIONAL if message.HasField(field)}
    for field in ("reference_timeout", "super_batch_ttl"):
        if message.HasField(field):
            spec[f"{field}_s"] = seconds(getattr(message, field))
    try:
        spec["policy"] = values_from_wire(message.policy)
        if message.fallback:
            spec["fallback"] = enum_name(pb.Fallback, message.fallback, "fallback")
        return JobSpec.model_validate(spec)
    except FieldError as error:
        raise InvalidField(f"spec.{error}", field_name=f"spec.{error.field}") from error
    except ValidationError as error:
        raise invalid_field(error, prefix="spec") from error


def invalid_field(error: ValidationError, *, prefix: str) -> InvalidField:
    """Return the error for the first field that pydantic found invalid, with its value and what was expected."""
    first = error.errors(include_url=False)[0]
    field = ".".join((prefix, *map(str, first["loc"])))
    return InvalidField(f"{field} is {reprlib.repr(first['input'])}: {first['msg']}", field_name=field)


def job_to_wire(job: Job, reference: ReferenceInfo | None, counters: Counters) -> pb.Job:
    """Return a job with its current state."""
    spec = job.spec
    return pb.Job(
        spec=pb.JobSpec(
            name=tenants.unscoped(spec.name),
            reference_model=spec.reference_model,
            policy=values_to_wire(spec.policy.model_dump(exclude_none=True)),
            world_size=spec.world_size,
            seed=spec.seed,
            fallback=fallback_to_wire(spec.fallback),
            reference_timeout=duration(spec.reference_timeout_s),
            max_in_flight=spec.max_in_flight,
            super_batch_ttl=duration(spec.super_batch_ttl_s),
            weight=spec.weight,
        ),
        created_at=timestamp(job.created_at_s),
        reference=None if reference is None else reference_to_wire(reference),
        counters=pb.JobCounters(**counters.model_dump()),
    )


def reference_to_wire(reference: ReferenceInfo) -> pb.ReferenceModel:
    """Return the reference model's own description."""
    fields = reference.model_dump(exclude={"inputs"})
    inputs = [pb.ReferenceInput(name=i.name, datatype=i.datatype, shape=i.shape) for i in reference.inputs]
    return pb.ReferenceModel(**fields, inputs=inputs)


def fallback_to_wire(fallback: str | None) -> pb.Fallback.ValueType:
    """Return a fallback's number; None is FALLBACK_UNSPECIFIED."""
    value: pb.Fallback.ValueType = enum_value(pb.Fallback, fallback or "unspecified")
    return value


async def header_of(messages: AsyncIterator[Any]) -> Any:
    """Return the header that a stream starts with.

    Raises:
        InvalidField: If it starts with something else, or is empty.
    """
    async for message in messages:
        if message.WhichOneof("message") == "header":
            return message.header
        break
    raise InvalidField("the stream does not start with a header", field_name="header")


def rank_ref_from_wire(message: Any) -> RankRef:
    """Return which rank of which super-batch a request or header is about.

    Raises:
        InvalidField: If the job's name or the super-batch's id is not valid.
    """
    job = job_name_from_wire(message.job, "job")
    super_batch_id = _checked(_SUPER_BATCH_ID, message.super_batch_id, "super_batch_id")
    return RankRef(SuperBatchRef(job, super_batch_id), message.rank)


def submission_from_wire(caller: RankRef, request: selection_pb2.SubmitSuperBatchRequest) -> Submission:
    """Return one rank's rows; their values are checked later, in a thread if they are many."""
    return Submission.model_construct(
        job=caller.ref.job,
        super_batch_id=caller.ref.super_batch_id,
        rank=caller.rank,
        world_size=request.world_size,
        keys=tuple(request.example_keys),
        step=_step(request),
        group_labels=tuple(request.group_labels),
        sources=tuple(request.example_sources),
    )


def _step(request: selection_pb2.SubmitSuperBatchRequest) -> int:
    if not request.HasField("step"):
        raise InvalidField("step is not set, expected the training step, from 0", field_name="step")
    return request.step


def attempt_request_from_wire(request: pb.OpenAttemptRequest) -> AttemptRequest:
    """Return a rank's call to join an attempt.

    Raises:
        InvalidField: If a field is invalid.
    """
    for field, pattern, expectation in _ATTEMPT_FIELDS:
        value = getattr(request, field)
        if not re.fullmatch(pattern, value):
            raise InvalidField(f"{field} is {reprlib.repr(value)}, expected {expectation}", field_name=field)
    if len(request.launch.encode()) > MAX_LAUNCH_BYTES:
        raise InvalidField(
            f"launch has {len(request.launch.encode())} bytes, the limit is {MAX_LAUNCH_BYTES}", field_name="launch"
        )
    if bool(request.parent) != request.HasField("parent_step"):
        raise InvalidField(
            f"parent is {request.parent!r} and parent_step is {'' if request.HasField('parent_step') else 'not '}set, "
            "expected both or neither",
            field_name="parent_step",
        )
    return AttemptRequest(
        job=job_name_from_wire(request.job, "job"),
        rank=request.rank,
        world_size=request.world_size,
        launch=request.launch,
        process_nonce=request.process_nonce,
        parent=request.parent,
        parent_step=request.parent_step if request.HasField("parent_step") else None,
    )


def accepted_to_wire(accepted: Accepted) -> selection_pb2.SubmitSuperBatchResponse:
    """Return the answer to a submission."""
    return selection_pb2.SubmitSuperBatchResponse(
        missing_positions=accepted.missing,
        reference=None if accepted.reference is None else reference_to_wire(accepted.reference),
        decided=accepted.decided,
    )


def upload_from_wire(caller: RankRef, header: selection_pb2.UploadExamplesHeader) -> UploadRequest:
    """Return the features that a rank announces."""
    return UploadRequest(caller.ref, caller.rank, tuple(header.positions), tuple(header.tensors))


def select_request_from_wire(
    caller: RankRef, header: selection_pb2.SelectSubBatchHeader, *, deadline_s: float
) -> SelectRequest:
    """Return the learner outputs that a rank announces, and until when it waits."""
    last_step_s = step_times_from_wire(header.last_step) if header.HasField("last_step") else None
    return SelectRequest(caller.ref, caller.rank, header.world_size, header, deadline_s, last_step_s)


def outcome_to_wire(outcome: Outcome, request: SelectRequest) -> selection_pb2.SelectSubBatchResponse:
    """Return a rank's part of a decision, with the reference embeddings of its rows if it asked for them."""
    decision, rank = outcome.decision, request.rank
    return selection_pb2.SelectSubBatchResponse(
        positions=decision.positions[rank],
        sub_batch_size=decision.sub_batch_size,
        super_batch_size=decision.super_batch_size,
        reference_version="" if decision.reference is None else decision.reference.version,
        cache_hits=decision.cache_hits,
        reference_inferences=decision.reference_inferences,
        perplexity=decision.perplexity,
        timings=selection_pb2.StageTimings(**{k: duration(s) for k, s in decision.timings_s.items()}),
        fallback=fallback_to_wire(decision.fallback),
        fallback_reason=decision.fallback_reason,
        reference_embeddings=_reference_of(outcome, rank) if request.header.return_reference_embeddings else [],
        weights=None if decision.weights is None else decision.weights[rank],
        gain=decision.policy.gain if decision.gain is None else decision.gain,
    )


def server_info(settings: SelectorSettings) -> selection_pb2.GetServerInfoResponse:
    """Return what this server supports, and its limits."""
    return selection_pb2.GetServerInfoResponse(
        version=__version__,
        scorings=[enum_value(pb.Scoring, name) for name in get_args(Scoring)],
        losses=[enum_value(pb.Loss, name) for name in get_args(Loss)],
        precisions=[enum_value(pb.Precision, name) for name in get_args(Precision)],
        learner_datatypes=LEARNER_DATATYPES,
        max_rows_per_rank=settings.max_rows_per_rank,
        max_tensor_bytes=settings.max_tensor_bytes,
        max_message_bytes=settings.max_message_bytes,
        max_world_size=settings.max_world_size,
        max_pair_loss_bytes=settings.max_pair_loss_bytes,
    )


def step_times_from_wire(times: selection_pb2.StepTimes) -> dict[str, float]:
    """Return seconds by phase, each between nothing and an hour, whatever a trainer reports."""
    return {
        field.name: min(max(getattr(times, field.name).ToMicroseconds() / 1e6, 0.0), LONGEST_PHASE_S)
        for field in times.DESCRIPTOR.fields
    }


def _reference_of(outcome: Outcome, rank: int) -> list[tensors_pb2.Tensor]:
    if outcome.reference is None:
        return []
    rows = torch.tensor(outcome.decision.positions[rank]) + outcome.row_offset(rank)
    image, text = outcome.reference[:, rows].unbind(0)
    specs, buffers = encode(dict(zip(EMBEDDINGS, (image, text), strict=True)))
    return [tensors_pb2.Tensor(spec=s, data=b.tobytes()) for s, b in zip(specs, buffers, strict=True)]


def _checked(adapter: TypeAdapter[str], value: str, field: str) -> str:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise invalid_field(error, prefix=field) from error
