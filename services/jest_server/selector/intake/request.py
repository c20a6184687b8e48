"""What may be wrong with one rank's rows of a super-batch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from jest_server.domain.errors import InvalidField
from jest_server.domain.policies import policy_of
from jest_server.domain.super_batches import MAX_KEY_BYTES
from jest_wire.tensors import content_digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jest_server.domain.jobs import JobSpec
    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.super_batches import Submission

_MAX_LABEL_BYTES = 256


def check_rank(rank: int, world_size: int, spec: JobSpec) -> None:
    """Refuse ranks that the job does not have.

    Raises:
        InvalidField: If `world_size` is not the job's or `rank` lies outside it.
    """
    if world_size != spec.world_size:
        raise InvalidField(
            f"world_size is {world_size}, job {spec.name!r} was created with {spec.world_size}", field_name="world_size"
        )
    if rank >= world_size:
        raise InvalidField(f"rank is {rank}, expected 0 to {world_size - 1}", field_name="rank")


def check_submission(submission: Submission, spec: JobSpec, reference: ReferenceInfo | None) -> Submission:
    """Return the submission as it is stored: checked, and with the job's reference model and its digest.

    Raises:
        InvalidField: If a value is invalid, or fewer rows may be selected than the sub-batch needs.
    """
    _check_lengths("example_keys", submission.keys, least=1, most=MAX_KEY_BYTES)
    _check_labels(submission, spec)
    if spec.world_size == 1:  # otherwise only all ranks together know the super-batch
        _check_enough(submission, spec)
    return submission.model_copy(update={"reference": reference, "digest": _digest(submission)})


def _digest(submission: Submission) -> str:
    sources = (submission.sources,) if submission.sources else ()
    s = submission
    return content_digest((), s.world_size, s.keys, s.step, s.group_labels, *sources)


def _check_labels(submission: Submission, spec: JobSpec) -> None:
    labels, limit = submission.group_labels, spec.policy.max_per_group
    if not labels and limit is None:
        return
    if len(labels) != len(submission.keys):
        needed = "" if limit is None else f", because max_per_group of job {spec.name!r} is {limit}"
        raise InvalidField(
            f"group_labels holds {len(labels)} labels, expected {len(submission.keys)}: one for each row{needed}",
            field_name="group_labels",
        )
    _check_lengths("group_labels", labels, least=0, most=_MAX_LABEL_BYTES)


def _check_lengths(field: str, texts: Sequence[str], *, least: int, most: int) -> None:
    for row, text in enumerate(texts):
        size = len(text.encode())
        if not least <= size <= most:
            raise InvalidField(
                f"{field}[{row}] is {size} bytes long, expected {least} to {most}", field_name=f"{field}[{row}]"
            )


def _check_enough(submission: Submission, spec: JobSpec) -> None:
    """Refuse a super-batch of one rank from which no sub-batch can be selected."""
    keys = submission.keys
    try:
        policy = policy_of(spec.policy)
        if submission.step is not None:
            policy = policy.at_step(submission.step, len(keys))
        needed = policy.resolve_sub_batch_size(len(keys))
    except ValueError as error:
        raise InvalidField(f"example_keys: {error}", field_name="example_keys") from error
    distinct = len(set(keys))
    if distinct < needed:
        raise InvalidField(
            f"example_keys holds {distinct} distinct keys, expected at least the sub-batch ({needed}): "
            "at most one of the rows with equal keys can be chosen",
            field_name="example_keys",
        )
    limit = spec.policy.max_per_group
    if limit is None:
        return
    counts = Counter(submission.group_labels)
    allowed = counts.pop("", 0) + sum(min(count, limit) for count in counts.values())
    if allowed < needed:
        raise InvalidField(
            f"group_labels allow {allowed} rows, expected at least the sub-batch ({needed}): max_per_group is {limit}",
            field_name="group_labels",
        )
