"""What the ranks' learners said of a super-batch, held in memory until the selection is made.

Losing it loses nothing: the ranks send it again. It is bounded all the same.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jest_server.errors import Conflict, QueueFull

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from jest_core import Embeddings
    from jest_server.model import Decision

HELD_FULL_RETRY_S = 1.0


@dataclass(frozen=True)
class LearnerOutputs:
    """One rank's embeddings, ``[rows, D]``, and the digest that tells whether a retry sends the same."""

    embeddings: Embeddings
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.embeddings.image.nbytes + self.embeddings.text.nbytes


@dataclass(frozen=True)
class Outcome:
    """A decision and, when it was made just now, the joined reference embeddings ``[B, 2, D]`` f16 behind it."""

    decision: Decision
    reference: torch.Tensor | None
    rows: tuple[int, ...] = ()
    """Rows of each rank; there when ``reference`` is."""

    def row_offset(self, rank: int) -> int:
        """Returns where the rank's rows start in ``reference``."""
        return sum(self.rows[:rank])


class Assembly:
    """The learner outputs of one super-batch as they come in, and the outcome that its callers wait for."""

    def __init__(self, job: str, super_batch_id: str, world_size: int) -> None:
        self.job = job
        self.super_batch_id = super_batch_id
        self.world_size = world_size
        self.outputs: dict[int, LearnerOutputs] = {}
        self.started_at = time.monotonic()
        self.complete = asyncio.Event()
        self.stage = "WAITING_FOR_RANKS"
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    @property
    def nbytes(self) -> int:
        """Bytes held for all ranks that have come."""
        return sum(outputs.nbytes for outputs in self.outputs.values())

    def missing_ranks(self) -> list[int]:
        """Returns the ranks whose learner outputs have not come."""
        return [rank for rank in range(self.world_size) if rank not in self.outputs]

    def add(self, rank: int, outputs: LearnerOutputs) -> None:
        """Takes a rank's outputs, or finds that they are there.

        Raises:
            Conflict: If the rank sent others before, or other ranks sent embeddings of another width.
        """
        context = {"job": self.job, "super_batch_id": self.super_batch_id, "rank": str(rank)}
        held = self.outputs.get(rank)
        if held is not None and held.digest != outputs.digest:
            raise Conflict(
                f"rank {rank} sent other learner outputs for super-batch {self.super_batch_id!r} before", context
            )
        for other, theirs in self.outputs.items():
            if _kind(theirs.embeddings) != _kind(outputs.embeddings):
                raise Conflict(
                    f"the ranks' learners differ: rank {rank} sent {_kind(outputs.embeddings)}, "
                    f"rank {other} {_kind(theirs.embeddings)}",
                    context,
                )
        self.outputs[rank] = outputs
        if not self.missing_ranks():
            self.complete.set()


class Assemblies:
    """All assemblies of this process, bounded by the bytes they hold together."""

    def __init__(self, *, max_held_bytes: int) -> None:
        self._max_held_bytes = max_held_bytes
        self._by_id: dict[tuple[str, str], Assembly] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def held_bytes(self) -> int:
        """Bytes held by all of them."""
        return sum(assembly.nbytes for assembly in self._by_id.values())

    def reserve(self, nbytes: int, context: dict[str, str]) -> None:
        """Refuses what would not fit, before it is received.

        Raises:
            QueueFull: If ``nbytes`` more would exceed the limit; it carries when to come back.
        """
        if self._by_id and self.held_bytes + nbytes > self._max_held_bytes:
            raise QueueFull(
                f"learner outputs of {self.held_bytes} bytes are held for undecided selections, "
                f"{nbytes} more would exceed the limit of {self._max_held_bytes}",
                context,
                retry_after_s=HELD_FULL_RETRY_S,
            )

    def join(self, job: str, super_batch_id: str, world_size: int, on_first: Callable[[Assembly], None]) -> Assembly:
        """Returns the super-batch's assembly; calls ``on_first`` with it if this call made it."""
        assembly = self._by_id.get((job, super_batch_id))
        if assembly is None:
            assembly = Assembly(job, super_batch_id, world_size)
            self._by_id[job, super_batch_id] = assembly
            on_first(assembly)
        return assembly

    def drop(self, assembly: Assembly) -> None:
        """Lets go of an assembly whose outcome is there."""
        self._by_id.pop((assembly.job, assembly.super_batch_id), None)


def _kind(embeddings: Embeddings) -> dict[str, object]:
    """Returns what has to be the same on all ranks."""
    return {
        "width": embeddings.image.shape[1],
        "dtype": str(embeddings.image.dtype).removeprefix("torch."),
        "scale": embeddings.scale,
        "bias": embeddings.bias,
    }
