"""Between the contract's selection policies and jest_core's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jest_core import Schedule, SelectionPolicy
from jest_proto.v1 import jobs_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping

_ENUMS: Mapping[str, Any] = {
    "scoring": pb.Scoring,
    "loss": pb.Loss,
    "normalization": pb.Normalization,
    "sampler": pb.Sampler,
    "placement": pb.Placement,
    "precision": pb.Precision,
}


def policy_to_wire(policy: SelectionPolicy) -> pb.SelectionPolicy:
    """Render a policy with every field set, so that no default has to agree on both sides."""
    message = pb.SelectionPolicy(
        num_chunks=policy.num_chunks,
        max_per_group=policy.max_per_group,
        weights=policy.weights,
        **{field: to_enum(enum, getattr(policy, field)) for field, enum in _ENUMS.items()},
    )
    if policy.sub_batch_size is not None:
        message.sub_batch_size = policy.sub_batch_size
    elif isinstance(policy.filter_ratio, Schedule):
        message.filter_ratio_schedule.CopyFrom(_schedule_to_wire(policy.filter_ratio))
    else:
        # The shortest decimal that means this number: 0.8, not 0.8000…4.
        message.filter_ratio = str(policy.filter_ratio)
    if isinstance(policy.gain, Schedule):
        message.gain_schedule.CopyFrom(_schedule_to_wire(policy.gain))
    else:
        message.gain = policy.gain
    return message


def policy_from_wire(message: pb.SelectionPolicy) -> SelectionPolicy:
    """Read a policy; what is unset takes the contract's default, which is jest_core's.

    Raises:
        ValueError: this version does not know a value of it, or cannot make sense of it.
    """
    fields: dict[str, Any] = {
        field: from_enum(enum, getattr(message, field)) for field, enum in _ENUMS.items() if getattr(message, field)
    }
    for field in ("num_chunks", "gain", "max_per_group"):
        if message.HasField(field):
            fields[field] = getattr(message, field)
    if message.HasField("gain_schedule"):
        fields["gain"] = _schedule_from_wire(message.gain_schedule)
    match message.WhichOneof("size"):
        case "sub_batch_size":
            fields["sub_batch_size"] = message.sub_batch_size
        case "filter_ratio":
            fields["filter_ratio"] = float(message.filter_ratio)
        case "filter_ratio_schedule":
            fields["filter_ratio"] = _schedule_from_wire(message.filter_ratio_schedule)
    return SelectionPolicy(**fields, weights=message.weights)


def to_enum(enum: Any, name: str) -> Any:
    """The contract's value for a name: hard_learner of Scoring is SCORING_HARD_LEARNER."""
    return enum.Value(f"{enum.DESCRIPTOR.name.upper()}_{name.upper()}")


def from_enum(enum: Any, value: int) -> str:
    """The inverse of `to_enum`; a value that this version does not know keeps its number."""
    if value not in enum.values():
        return str(value)
    prefix = enum.DESCRIPTOR.name.upper() + "_"
    return str(enum.Name(value).removeprefix(prefix).lower())


def _schedule_to_wire(schedule: Schedule) -> pb.Schedule:
    fields = schedule.to_dict()
    return pb.Schedule(**fields | {"shape": to_enum(pb.Schedule.Shape, schedule.shape)})


def _schedule_from_wire(message: pb.Schedule) -> Schedule:
    fields: dict[str, Any] = {field: getattr(message, field) for field in ("end", "steps") if message.HasField(field)}
    if message.shape:
        fields["shape"] = from_enum(pb.Schedule.Shape, message.shape)
    return Schedule(start=message.start, warmup_steps=message.warmup_steps, **fields)
