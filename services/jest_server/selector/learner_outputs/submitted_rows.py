"""How many rows the ranks of a super-batch submitted: what their learners' outputs are checked against."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from jest_server.domain.errors import WaitTimeout
from jest_server.selector.not_in_flight import not_in_flight_error

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jest_server.domain.ports import DecisionLog, SuperBatchStore
    from jest_server.domain.super_batches import RankRef
    from jest_server.selector.learner_outputs.request import SelectRequest

POLL_S: Final = 0.1
"""Between two looks whether the other ranks have submitted: no event reports that."""


class SubmittedRows:
    """Counts the submitted rows of super-batches in flight."""

    def __init__(self, super_batches: SuperBatchStore, decisions: DecisionLog) -> None:
        self._super_batches = super_batches
        self._decisions = decisions

    async def of_rank(self, caller: RankRef) -> int:
        """Return how many rows the rank submitted.

        Raises:
            SuperBatchUnknown, DeadLettered: If the super-batch is not in flight, or this rank did not submit it.
        """
        return (await self._counts(caller, [caller.rank]))[caller.rank]

    async def of_all_ranks(self, request: SelectRequest) -> list[int]:
        """Return how many rows each rank submitted, once all have.

        Raises:
            SuperBatchUnknown, DeadLettered: If the super-batch is not in flight, or this rank did not submit it.
            WaitTimeout: If the call's deadline came first; the message names the ranks that have not submitted.
        """
        ranks = range(request.world_size)
        counts: dict[int, int] = {}
        absent = list(ranks)
        try:
            async with asyncio.timeout(request.patience_s):
                while True:
                    counts |= await self._counts(request, {request.rank, *absent})
                    absent = [rank for rank in ranks if rank not in counts]
                    if not absent:
                        return [counts[rank] for rank in ranks]
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise WaitTimeout(
                f"{request.ref} has no known size within the caller's deadline: "
                f"ranks {absent} have not submitted their rows",
                request.metadata,
                reason="WAITING_FOR_RANKS",
            ) from None

    async def _counts(self, caller: RankRef, ranks: Iterable[int]) -> dict[int, int]:
        counts = await self._super_batches.row_counts(caller.ref, ranks)
        if caller.rank not in counts:
            raise await not_in_flight_error(self._decisions, caller.ref, caller.rank)
        return counts
