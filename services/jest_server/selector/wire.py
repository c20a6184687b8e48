"""Between the contract's messages and the server's vocabulary; unset fields become the contract's defaults."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ValidationError

from jest_proto.v1 import jobs_pb2 as pb
from jest_proto.v1 import selection_pb2
from jest_server.domain import tenants
from jest_server.domain.errors import InvalidField
from jest_server.domain.jobs import JobSpec
from jest_server.domain.policies import PolicySpec, ScheduleSpec, schedule_of

if TYPE_CHECKING:
    from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

    from jest_server.domain.jobs import Counters, Job
    from jest_server.domain.references import ReferenceInfo

_POLICY_ENUMS: dict[str, tuple[Any, str]] = {
    "scoring": (pb.Scoring, "SCORING_"),
    "loss": (pb.Loss, "LOSS_"),
    "normalization": (pb.Normalization, "NORMALIZATION_"),
    "sampler": (pb.Sampler, "SAMPLER_"),
    "placement": (pb.Placement, "PLACEMENT_"),
    "precision": (pb.Precision, "PRECISION_"),
}
LONGEST_PHASE_S: Final = 3600.0
"""What a trainer says of one step counts for no more."""
_SHAPE = (pb.Schedule.Shape, "SHAPE_")
_SIZES = ("sub_batch_size", "filter_ratio", "filter_ratio_schedule")
_OPTIONAL: Final = ("world_size", "max_in_flight", "weight")
_SCHEDULES = ("filter_ratio_schedule", "gain_schedule")


def job_spec_from_wire(message: pb.JobSpec) -> JobSpec:
    """Reads a job's spec.

    Raises:
        InvalidField: For the first field that cannot be.
    """
    spec: dict[str, Any] = {
        "name": message.name,
        "reference_model": message.reference_model,
        "policy": _policy_from_wire(message.policy),
        "seed": message.seed,
    }
    spec |= {field: getattr(message, field) for field in _OPTIONAL if message.HasField(field)}
    for field in ("reference_timeout", "super_batch_ttl"):
        if message.HasField(field):
            spec[f"{field}_s"] = getattr(message, field).ToNanoseconds() / 1e9
    if message.fallback:
        spec["fallback"] = _name_of(pb.Fallback, "FALLBACK_", message.fallback, "fallback")
    try:
        return JobSpec.model_validate(spec)
    except ValidationError as error:
        raise invalid_field(error, prefix="spec") from error


def invalid_field(error: ValidationError, *, prefix: str) -> InvalidField:
    """Names the first field that pydantic found wrong, with its value and what was expected."""
    first = error.errors(include_url=False)[0]
    field = ".".join((prefix, *map(str, first["loc"])))
    return InvalidField(f"{field} is {reprlib.repr(first['input'])}: {first['msg']}", field_name=field)


def job_to_wire(job: Job, reference: ReferenceInfo | None, counters: Counters) -> pb.Job:
    """Renders a job with what is known of it now."""
    spec = job.spec
    return pb.Job(
        spec=pb.JobSpec(
            name=tenants.unscoped(spec.name),
            reference_model=spec.reference_model,
            policy=_policy_to_wire(spec.policy),
            world_size=spec.world_size,
            seed=spec.seed,
            fallback=fallback_to_wire(spec.fallback),
            reference_timeout=duration(spec.reference_timeout_s),
            max_in_flight=spec.max_in_flight,
            super_batch_ttl=duration(spec.super_batch_ttl_s),
            weight=spec.weight,
        ),
        created_at=_timestamp(job.created_at_s),
        reference=None if reference is None else reference_to_wire(reference),
        counters=pb.JobCounters(**counters.model_dump()),
    )


def reference_to_wire(reference: ReferenceInfo) -> pb.ReferenceModel:
    """Renders what the reference model's configuration says."""
    fields = reference.model_dump(exclude={"inputs"})
    inputs = [pb.ReferenceInput(name=i.name, datatype=i.datatype, shape=i.shape) for i in reference.inputs]
    return pb.ReferenceModel(**fields, inputs=inputs)


def fallback_to_wire(fallback: str | None) -> pb.Fallback.ValueType:
    """Renders a fallback's name; None is FALLBACK_UNSPECIFIED."""
    return pb.Fallback.Value(f"FALLBACK_{(fallback or 'unspecified').upper()}")


def duration(seconds: float) -> Duration:
    """Renders seconds."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def _timestamp(seconds: float) -> Timestamp:
    message = Timestamp()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def _policy_from_wire(message: pb.SelectionPolicy) -> dict[str, Any]:
    policy: dict[str, Any] = {
        field: _name_of(enum, prefix, getattr(message, field), f"policy.{field}")
        for field, (enum, prefix) in _POLICY_ENUMS.items()
        if getattr(message, field)
    }
    size = message.WhichOneof("size")
    if size is None:
        raise InvalidField(
            f"policy.size is not set, expected one of {', '.join(_SIZES)}", field_name="spec.policy.size"
        )
    if message.HasField("gain") and message.HasField("gain_schedule"):
        raise InvalidField(
            f"spec.policy.gain_schedule is set beside gain ({message.gain:g}), expected one of the two",
            field_name="spec.policy.gain_schedule",
        )
    for field in (size, "num_chunks", "gain", "gain_schedule", "max_per_group"):
        if message.HasField(field):
            value = getattr(message, field)
            policy[field] = _schedule_from_wire(value, f"policy.{field}") if field in _SCHEDULES else value
    return policy | {"weights": message.weights}


def _schedule_from_wire(message: pb.Schedule, field: str) -> ScheduleSpec:
    schedule = ScheduleSpec(
        shape=_name_of(*_SHAPE, message.shape or pb.Schedule.SHAPE_CONSTANT, f"{field}.shape"),
        start=message.start,
        end=message.end if message.HasField("end") else None,
        steps=message.steps if message.HasField("steps") else None,
        warmup_steps=message.warmup_steps,
    )
    try:
        schedule_of(schedule)
    except ValueError as error:
        raise InvalidField(f"spec.{field}: {error}", field_name=f"spec.{field}") from error
    return schedule


def _policy_to_wire(policy: PolicySpec) -> pb.SelectionPolicy:
    fields = policy.model_dump(exclude_none=True)
    for field, (enum, prefix) in _POLICY_ENUMS.items():
        fields[field] = enum.Value(f"{prefix}{fields[field].upper()}")
    for field in _SCHEDULES:
        if field in fields:
            enum, prefix = _SHAPE
            fields[field]["shape"] = enum.Value(f"{prefix}{fields[field]['shape'].upper()}")
    if policy.gain_schedule is not None:
        del fields["gain"]
    return pb.SelectionPolicy(**fields)


def _name_of(enum: EnumTypeWrapper | Any, prefix: str, value: int, field: str) -> Any:
    names = {number: name for name, number in enum.items()}
    if value not in names:
        known = ", ".join(name for number, name in sorted(names.items()) if number)
        raise InvalidField(f"spec.{field} is {value}, expected one of {known}", field_name=f"spec.{field}")
    return str(names[value].removeprefix(prefix).lower())


def step_times_from_wire(times: selection_pb2.StepTimes) -> dict[str, float]:
    """Returns seconds by phase, each between nothing and an hour, whatever a trainer says."""
    return {
        field.name: min(max(getattr(times, field.name).ToMicroseconds() / 1e6, 0.0), LONGEST_PHASE_S)
        for field in times.DESCRIPTOR.fields
    }
