"""One rank's rows of a super-batch as it submits them, and all that may be wrong with them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jest_proto.tensors import content_digest
from jest_server.domain.errors import InvalidField
from jest_server.domain.policies import policy_of
from jest_server.domain.super_batches import MAX_KEY_BYTES, Submission, SuperBatchRef

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jest_server.domain.jobs import JobSpec
    from jest_server.domain.references import ReferenceInfo

_MAX_LABEL_BYTES = 256


@dataclass(frozen=True)
class OfRank:
    """What is one rank's, of one super-batch."""

    job: str
    super_batch_id: str
    rank: int

    @property
    def ref(self) -> SuperBatchRef:
        """Return the name of the super-batch."""
        return SuperBatchRef(self.job, self.super_batch_id)

    def context(self) -> dict[str, str]:
        """Returns the ids for errors and logs."""
        return self.ref.metadata | {"rank": str(self.rank)}


@dataclass(frozen=True)
class Rows(OfRank):
    """One rank's rows of a super-batch as it submits them; see the contract for what is optional."""

    world_size: int
    keys: tuple[str, ...]
    step: int | None = None
    group_labels: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def digest(self) -> str:
        """Names the content."""
        sources = (self.sources,) if self.sources else ()
        return content_digest((), self.world_size, self.keys, self.step, self.group_labels, *sources)


def check_rank(rank: int, world_size: int, spec: JobSpec) -> None:
    """Refuses ranks that the job does not have.

    Raises:
        InvalidField: If ``world_size`` is not the job's or ``rank`` lies outside it.
    """
    if world_size != spec.world_size:
        raise InvalidField(
            f"world_size is {world_size}, job {spec.name!r} was created with {spec.world_size}", field_name="world_size"
        )
    if rank >= world_size:
        raise InvalidField(f"rank is {rank}, expected 0 to {world_size - 1}", field_name="rank")


def submission_of(rows: Rows, spec: JobSpec, reference: ReferenceInfo | None) -> Submission:
    """Returns the rows as the store keeps them.

    Raises:
        InvalidField: If a value cannot be, or fewer rows may be chosen than the sub-batch needs.
    """
    _check_lengths("example_keys", rows.keys, least=1, most=MAX_KEY_BYTES)
    if rows.step is None and spec.policy.is_scheduled:
        raise InvalidField(
            f"step is not set, expected the training step: the policy of job {spec.name!r} has a schedule",
            field_name="step",
        )
    _check_labels(rows, spec)
    if spec.world_size == 1:  # otherwise only all ranks together know the super-batch
        _check_enough(rows, spec)
    return Submission(
        job=rows.job,
        super_batch_id=rows.super_batch_id,
        rank=rows.rank,
        world_size=rows.world_size,
        reference=reference,
        keys=rows.keys,
        digest=rows.digest(),
        step=rows.step,
        group_labels=rows.group_labels,
    )


def _check_labels(rows: Rows, spec: JobSpec) -> None:
    limit = spec.policy.max_per_group
    if not rows.group_labels and limit is None:
        return
    if len(rows.group_labels) != len(rows.keys):
        needed = "" if limit is None else f", because max_per_group of job {spec.name!r} is {limit}"
        raise InvalidField(
            f"group_labels holds {len(rows.group_labels)} labels, expected {len(rows.keys)}: one for each row{needed}",
            field_name="group_labels",
        )
    _check_lengths("group_labels", rows.group_labels, least=0, most=_MAX_LABEL_BYTES)


def _check_lengths(field: str, texts: Sequence[str], *, least: int, most: int) -> None:
    for row, text in enumerate(texts):
        size = len(text.encode())
        if not least <= size <= most:
            raise InvalidField(
                f"{field}[{row}] is {size} bytes long, expected {least} to {most}", field_name=f"{field}[{row}]"
            )


def _check_enough(rows: Rows, spec: JobSpec) -> None:
    """Refuses a super-batch of one rank from which no sub-batch can be chosen."""
    try:
        policy = policy_of(spec.policy)
        if rows.step is not None:
            policy = policy.at_step(rows.step, len(rows.keys))
        needed = policy.resolve_sub_batch_size(len(rows.keys))
    except ValueError as error:
        raise InvalidField(f"example_keys: {error}", field_name="example_keys") from error
    if len(set(rows.keys)) < needed:
        raise InvalidField(
            f"example_keys holds {len(set(rows.keys))} distinct keys, expected at least the sub-batch ({needed}): "
            "at most one of the rows with equal keys can be chosen",
            field_name="example_keys",
        )
    limit = spec.policy.max_per_group
    if limit is None:
        return
    counts = Counter(rows.group_labels)
    allowed = counts.pop("", 0) + sum(min(count, limit) for count in counts.values())
    if allowed < needed:
        raise InvalidField(
            f"group_labels allow {allowed} rows, expected at least the sub-batch ({needed}): max_per_group is {limit}",
            field_name="group_labels",
        )
