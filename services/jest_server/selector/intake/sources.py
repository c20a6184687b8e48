"""Rows whose examples are named by reference: checked at the door, and queued for scorers to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jest_server.domain.chunked import chunked
from jest_server.domain.errors import InvalidField
from jest_server.domain.shards import Shard
from jest_server.stores import blobs
from jest_wire import tracing
from jest_wire.tensors import content_digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.sources import AllowedSources
    from jest_server.domain.super_batches import Submission


def check_sources(submission: Submission, allowed: AllowedSources) -> None:
    """Refuse sources that scorers would refuse, before anything is stored.

    Raises:
        InvalidField: Naming the first that may not be read.
    """
    if submission.sources and len(submission.sources) != len(submission.keys):
        raise InvalidField(
            f"example_sources holds {len(submission.sources)} sources, expected {len(submission.keys)}: "
            "one for each row, or none",
            field_name="example_sources",
        )
    for row, source in enumerate(submission.sources):
        if source:
            try:
                allowed.check(source)
            except ValueError as error:
                field = f"example_sources[{row}]"
                raise InvalidField(f"{field} {error}", field_name=field) from error


def shards_of_sources(
    submission: Submission, positions: Sequence[int], reference: ReferenceInfo, *, shard_examples: int
) -> tuple[str, list[Shard]]:
    """Return a digest of what is to be read, and shards of it; what lies in one tar lies together."""
    ordered = sorted(positions, key=lambda row: submission.sources[row])
    digest = content_digest((), list(positions), [submission.sources[row] for row in positions])
    return digest, [
        Shard(
            shard_id=f"{submission.rank}-{digest[:16]}-{number:06d}",
            job=submission.job,
            super_batch_id=submission.super_batch_id,
            reference_model=reference.name,
            reference_version=reference.version,
            keys=tuple(submission.keys[row] for row in piece),
            features=blobs.pack({"sources": [submission.sources[row] for row in piece]}),
            traceparent=tracing.traceparent(),
        )
        for number, piece in enumerate(chunked(ordered, shard_examples))
    ]
