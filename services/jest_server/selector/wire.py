"""The contract's messages to the server's values and back; unset fields take the contract's defaults."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from jest_proto.v1 import jobs_pb2 as pb
from jest_proto.v1 import selection_pb2
from jest_server.domain import tenants
from jest_server.domain.errors import InvalidField
from jest_server.domain.jobs import JobSpec
from jest_wire.policies import values_from_wire, values_to_wire
from jest_wire.values import FieldError, duration, enum_name, enum_value, seconds, timestamp

if TYPE_CHECKING:
    from jest_server.domain.jobs import Counters, Job
    from jest_server.domain.references import ReferenceInfo

LONGEST_PHASE_S: Final = 3600.0
"""What a trainer says of one step counts for no more."""
_OPTIONAL: Final = ("world_size", "max_in_flight", "weight")


def job_spec_from_wire(message: pb.JobSpec) -> JobSpec:
    """Return a job's spec.

    Raises:
        InvalidField: A field is invalid; the error names the first.
    """
    spec: dict[str, Any] = {"name": message.name, "reference_model": message.reference_model, "seed": message.seed}
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
    """Renders what the reference model's configuration says."""
    fields = reference.model_dump(exclude={"inputs"})
    inputs = [pb.ReferenceInput(name=i.name, datatype=i.datatype, shape=i.shape) for i in reference.inputs]
    return pb.ReferenceModel(**fields, inputs=inputs)


def fallback_to_wire(fallback: str | None) -> pb.Fallback.ValueType:
    """Renders a fallback's name; None is FALLBACK_UNSPECIFIED."""
    value: pb.Fallback.ValueType = enum_value(pb.Fallback, fallback or "unspecified")
    return value


def step_times_from_wire(times: selection_pb2.StepTimes) -> dict[str, float]:
    """Returns seconds by phase, each between nothing and an hour, whatever a trainer says."""
    return {
        field.name: min(max(getattr(times, field.name).ToMicroseconds() / 1e6, 0.0), LONGEST_PHASE_S)
        for field in times.DESCRIPTOR.fields
    }
