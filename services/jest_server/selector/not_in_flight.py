"""Why a super-batch is not in flight, as the error that its caller gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jest_server.domain.dead_letters import SUPERSEDED
from jest_server.domain.errors import AttemptSuperseded, DeadLettered, JestServerError, SuperBatchUnknown
from jest_server.domain.super_batches import RankRef

if TYPE_CHECKING:
    from jest_server.domain.ports import DecisionLog
    from jest_server.domain.super_batches import SuperBatchRef


async def not_in_flight_error(log: DecisionLog, ref: SuperBatchRef, rank: int = 0) -> JestServerError:
    """Return the error that explains to a rank why its super-batch is not in flight."""
    metadata = RankRef(ref, rank).metadata
    letter = await log.get_dead_letter(ref)
    if letter is not None and letter.reason == SUPERSEDED:
        return AttemptSuperseded(f"{ref} was dead-lettered: {letter.detail}", metadata)
    if letter is not None:
        return DeadLettered(f"{ref} was dead-lettered: {letter.reason}: {letter.detail}", metadata)
    return SuperBatchUnknown(f"rank {rank} did not submit {ref}; submit it first", metadata)
