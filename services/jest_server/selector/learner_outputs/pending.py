"""What the ranks' learners said of a super-batch, held in memory until the selection is made.

Losing it loses nothing: the ranks send it again. It is bounded all the same.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from jest_core import Embeddings, ExampleLosses
from jest_server.domain.errors import Conflict, QueueFull
from jest_server.domain.super_batches import SuperBatchRef
from jest_server.selector.learner_outputs.spilled_matrix import ScratchMatrices, ScratchMatrix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from jest_server.domain.decisions import Decision

HELD_FULL_RETRY_S = 1.0


@dataclass(frozen=True)
class LossesOfModels:
    """``[rows]`` losses of single examples, of each model that the scoring needs."""

    learner: ExampleLosses | None
    reference: ExampleLosses | None


RankOutputs: TypeAlias = Embeddings | ScratchMatrix | LossesOfModels
"""Embeddings ``[rows, D]``; or the super-batch's matrix, in which the rank's rows are; or losses of examples."""


@dataclass(frozen=True)
class LearnerOutputs:
    """What one rank's learner says of its rows, and the digest that tells whether a retry sends the same."""

    outputs: RankOutputs
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(tensor.nbytes for tensor in _tensors(self.outputs))


@dataclass(frozen=True)
class Outcome:
    """A decision and, when it was made just now, the joined reference embeddings ``[2, B, D]`` f16 behind it."""

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
    def ref(self) -> SuperBatchRef:
        """Return the name of the super-batch."""
        return SuperBatchRef(self.job, self.super_batch_id)

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
            Conflict: If the rank sent others before, or other ranks' outputs are of another width or datatype.
        """
        self.held(rank, outputs.digest)
        for other, theirs in self.outputs.items():
            if _kind(theirs.outputs) != _kind(outputs.outputs):
                raise Conflict(
                    f"the ranks' learners differ: rank {rank} sent {_kind(outputs.outputs)}, "
                    f"rank {other} {_kind(theirs.outputs)}",
                    self._context(rank),
                )
        self.outputs[rank] = outputs
        if not self.missing_ranks():
            self.complete.set()

    def held(self, rank: int, digest: str) -> LearnerOutputs | None:
        """Returns the rank's outputs if they have come.

        Raises:
            Conflict: If they were others than those of this digest.
        """
        held = self.outputs.get(rank)
        if held is not None and held.digest != digest:
            raise Conflict(
                f"rank {rank} sent other learner outputs for super-batch {self.super_batch_id!r} before",
                self._context(rank),
            )
        return held

    def _context(self, rank: int) -> dict[str, str]:
        return {"job": self.job, "super_batch_id": self.super_batch_id, "rank": str(rank)}


class Assemblies:
    """All assemblies of this process, bounded by the bytes they hold together, in memory and in scratch files."""

    def __init__(self, *, max_held_bytes: int, scratch_dir: Path | None = None) -> None:
        self._max_held_bytes = max_held_bytes
        self._by_id: dict[tuple[str, str], Assembly] = {}
        self._matrices = ScratchMatrices(scratch_dir)
        self._receiving_bytes = 0

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def held_bytes(self) -> int:
        """Bytes held by all of them, or being received for them."""
        held = sum(assembly.nbytes for assembly in self._by_id.values())
        return held + self._receiving_bytes + self._matrices.nbytes

    @contextmanager
    def receiving(self, nbytes: int, context: dict[str, str]) -> Iterator[None]:
        """Counts what the block receives as held; refuses what would not fit before it is received.

        Raises:
            QueueFull: If ``nbytes`` more would exceed the limit; it carries when to come back.
        """
        self._require_room(nbytes, context)
        self._receiving_bytes += nbytes
        try:
            yield
        finally:
            self._receiving_bytes -= nbytes

    async def hold_matrix(self, job: str, super_batch_id: str, size: int, datatype: str) -> ScratchMatrix:
        """Returns the super-batch's pair-loss matrix, made now unless another rank's call did.

        The caller lets go of it, or hands it to the assembly as a rank's outputs, which ``drop`` lets go of.

        Raises:
            QueueFull: If there is no room for it.
            Conflict: If another rank sends losses of another datatype.
        """
        return await self._matrices.hold(job, super_batch_id, size, datatype, self._require_room)

    def let_go_of_matrix(self, job: str, super_batch_id: str, matrix: ScratchMatrix) -> None:
        """Takes back one hold of a pair-loss matrix; the last one frees its disk space."""
        self._matrices.let_go(job, super_batch_id, matrix)

    def find(self, job: str, super_batch_id: str) -> Assembly | None:
        """Returns the super-batch's assembly if a rank's outputs have come."""
        return self._by_id.get((job, super_batch_id))

    def join(self, job: str, super_batch_id: str, world_size: int, on_first: Callable[[Assembly], None]) -> Assembly:
        """Returns the super-batch's assembly; calls ``on_first`` with it if this call made it."""
        assembly = self._by_id.get((job, super_batch_id))
        if assembly is None:
            assembly = Assembly(job, super_batch_id, world_size)
            self._by_id[job, super_batch_id] = assembly
            on_first(assembly)
        return assembly

    def drop(self, assembly: Assembly) -> None:
        """Lets go of an assembly whose outcome is there, and of what it held."""
        if self._by_id.pop((assembly.job, assembly.super_batch_id), None) is None:
            return
        for held in assembly.outputs.values():
            if isinstance(held.outputs, ScratchMatrix):
                self.let_go_of_matrix(assembly.job, assembly.super_batch_id, held.outputs)

    def _require_room(self, nbytes: int, context: dict[str, str]) -> None:
        if self.held_bytes and self.held_bytes + nbytes > self._max_held_bytes:
            raise QueueFull(
                f"learner outputs of {self.held_bytes} bytes are held for undecided selections, "
                f"{nbytes} more would exceed the limit of {self._max_held_bytes}",
                context | {"limit": "JEST_MAX_HELD_BYTES"},
                retry_after_s=HELD_FULL_RETRY_S,
            )


def _tensors(outputs: RankOutputs) -> list[torch.Tensor]:
    """Returns what is held in memory for one rank alone."""
    match outputs:
        case Embeddings(image=image, text=text):
            return [image, text]
        case LossesOfModels(learner=learner, reference=reference):
            return [losses.values for losses in (learner, reference) if losses is not None]
    return []


def _kind(outputs: RankOutputs) -> dict[str, object]:
    """Returns what has to be the same on all ranks."""
    kind: dict[str, object] = {"dtypes": [str(t.dtype).removeprefix("torch.") for t in _tensors(outputs)]}
    if isinstance(outputs, Embeddings):
        kind |= {"width": outputs.image.shape[1], "scale": outputs.scale, "bias": outputs.bias}
    return kind
