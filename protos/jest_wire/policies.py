"""Selection policies: between `jest_core`, the contract's messages, and plain values named as in the contract.

Plain values hold only what is set: words for enums, numbers, a decimal string for `filter_ratio`, a dictionary for a
schedule. They are also how the REST interface and stored records write a policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from jest_core import Schedule, SelectionPolicy
from jest_proto.v1 import jobs_pb2 as pb
from jest_wire.values import FieldError, enum_name, enum_value

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
_OPTIONAL: Final = ("num_chunks", "gain", "max_per_group", "gain_schedule")
_SIZES = tuple(field.name for field in pb.SelectionPolicy.DESCRIPTOR.oneofs_by_name["size"].fields)
_SCHEDULES = {"filter_ratio_schedule": "filter_ratio", "gain_schedule": "gain"}


def policy_to_wire(policy: SelectionPolicy) -> pb.SelectionPolicy:
    """Return a message with every field set, so that no default has to agree on both sides."""
    return values_to_wire(_policy_to_values(policy))


def policy_from_wire(message: pb.SelectionPolicy) -> SelectionPolicy:
    """Return the policy of a message; unset fields take the contract's defaults, which are `jest_core`'s.

    Raises:
        FieldError: A field is missing or unknown to this version.
        ValueError: The policy makes no sense.
    """
    return policy_from_values(values_from_wire(message))


def policy_from_values(values: Mapping[str, Any]) -> SelectionPolicy:
    """Return the policy that plain values describe.

    Raises:
        ValueError: It makes no sense; the message names field, value and expectation.
    """
    fields = {name: value for name, value in values.items() if name not in _SCHEDULES}
    if "filter_ratio" in fields:
        fields["filter_ratio"] = float(fields["filter_ratio"])
    for name, field in _SCHEDULES.items():
        if name in values:
            fields[field] = Schedule(**values[name])
    return SelectionPolicy(**fields)


def values_to_wire(values: Mapping[str, Any]) -> pb.SelectionPolicy:
    """Return the message of plain values; a gain is left out where there is a schedule for it."""
    fields = {name: enum_value(_ENUMS[name], value) if name in _ENUMS else value for name, value in values.items()}
    for name in _SCHEDULES.keys() & fields.keys():
        fields[name] = {**fields[name], "shape": enum_value(pb.Schedule.Shape, fields[name]["shape"])}
    if "gain_schedule" in fields:
        fields.pop("gain", None)
    return pb.SelectionPolicy(**fields)


def values_from_wire(message: pb.SelectionPolicy) -> dict[str, Any]:
    """Return the plain values of a message, only what is set.

    Raises:
        FieldError: No size is set, two gains are, an enum is unknown, or a schedule makes no sense.
    """
    values: dict[str, Any] = {
        field: enum_name(enum, getattr(message, field), f"policy.{field}")
        for field, enum in _ENUMS.items()
        if getattr(message, field)
    }
    size = message.WhichOneof("size")
    if size is None:
        raise FieldError("policy.size", f" is not set, expected one of {', '.join(_SIZES)}")
    if message.HasField("gain") and message.HasField("gain_schedule"):
        raise FieldError("policy.gain_schedule", f" is set beside gain ({message.gain:g}), expected one of the two")
    for field in (size, *_OPTIONAL):
        if message.HasField(field):
            value = getattr(message, field)
            values[field] = _schedule_from_wire(value, f"policy.{field}") if field in _SCHEDULES else value
    return values | {"weights": message.weights}


def _policy_to_values(policy: SelectionPolicy) -> dict[str, Any]:
    values = {name: value for name, value in policy.to_dict().items() if value is not None}
    for name, field in _SCHEDULES.items():
        if isinstance(values.get(field), dict):
            values[name] = {key: value for key, value in values.pop(field).items() if value is not None}
    if "filter_ratio" in values:
        values["filter_ratio"] = str(policy.filter_ratio)  # the shortest decimal of this number: 0.8, not 0.8000…4
    return values


def _schedule_from_wire(message: pb.Schedule, field: str) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(message, name) for name in ("end", "steps") if message.HasField(name)}
    values |= {"start": message.start, "warmup_steps": message.warmup_steps}
    values["shape"] = enum_name(pb.Schedule.Shape, message.shape or pb.Schedule.SHAPE_CONSTANT, f"{field}.shape")
    try:
        Schedule(**values)
    except ValueError as error:
        raise FieldError(field, f": {error}") from error
    return values
