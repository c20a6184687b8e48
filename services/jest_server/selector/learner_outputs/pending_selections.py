"""What the ranks' learners sent for a super-batch, held in memory until its selection is made.

Losing it loses nothing, because the ranks send it again; it is bounded all the same.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from jest_core import Embeddings, ExampleLosses
from jest_server.domain.errors import Conflict, QueueFull
from jest_server.domain.super_batches import RankRef
from jest_server.selector.learner_outputs.spilled_matrix import SpilledMatrices, SpilledMatrix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from jest_server.domain.decisions import Decision
    from jest_server.domain.super_batches import SuperBatchRef

HELD_FULL_RETRY_S = 1.0


@dataclass(frozen=True)
class LossesOfModels:
    """`[rows]` losses of single examples, of each model that the scoring needs."""

    learner: ExampleLosses | None
    reference: ExampleLosses | None


RankOutputs: TypeAlias = Embeddings | SpilledMatrix | LossesOfModels
"""Embeddings `[rows, D]`; or the super-batch's matrix, in which the rank's rows are; or losses of examples."""


@dataclass(frozen=True)
class LearnerOutputs:
    """What one rank's learner sent for its rows, and the digest by which a retry is recognized."""

    outputs: RankOutputs
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(tensor.nbytes for tensor in _tensors(self.outputs))


@dataclass(frozen=True)
class Outcome:
    """A decision and, when it was made just now, the joined reference embeddings `[2, B, D]` f16 behind it."""

    decision: Decision
    reference: torch.Tensor | None
    rows: tuple[int, ...] = ()
    """Rows of each rank; set when `reference` is."""

    def row_offset(self, rank: int) -> int:
        """Return where the rank's rows start in `reference`."""
        return sum(self.rows[:rank])


class PendingSelection:
    """The learner outputs of one super-batch as they arrive, and the outcome that its callers wait for."""

    def __init__(self, ref: SuperBatchRef, world_size: int) -> None:
        self.ref = ref
        self.world_size = world_size
        self.outputs: dict[int, LearnerOutputs] = {}
        self.started_at = time.monotonic()
        self.complete = asyncio.Event()
        self.stage = "WAITING_FOR_RANKS"
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    @property
    def nbytes(self) -> int:
        """Bytes held for all ranks whose outputs have arrived."""
        return sum(outputs.nbytes for outputs in self.outputs.values())

    def missing_ranks(self) -> list[int]:
        """Return the ranks whose learner outputs have not arrived."""
        return [rank for rank in range(self.world_size) if rank not in self.outputs]

    def add(self, rank: int, outputs: LearnerOutputs) -> None:
        """Add a rank's outputs; until the selection is computed, they replace what the rank sent before.

        A process that came back after a crash may send outputs that differ in their last bits.

        Raises:
            Conflict: If other ranks' outputs are of another width or datatype, or their scale or bias differs.
        """
        if self.stage == "COMPUTING":
            return
        for other, theirs in self.outputs.items():
            if other != rank and not _fit(theirs.outputs, outputs.outputs):
                raise Conflict(
                    f"the ranks' learners differ: rank {rank} sent {_kind(outputs.outputs)}, "
                    f"rank {other} {_kind(theirs.outputs)}",
                    RankRef(self.ref, rank).metadata,
                )
        self.outputs[rank] = outputs
        if not self.missing_ranks():
            self.complete.set()


class PendingSelections:
    """All pending selections of this process, bounded by the bytes they hold together, in memory and in files."""

    def __init__(self, *, max_held_bytes: int, scratch_dir: Path | None = None) -> None:
        self._max_held_bytes = max_held_bytes
        self._by_ref: dict[SuperBatchRef, PendingSelection] = {}
        self._matrices = SpilledMatrices(scratch_dir)
        self._receiving_bytes = 0

    def __len__(self) -> int:
        return len(self._by_ref)

    @property
    def held_bytes(self) -> int:
        """Bytes held by all of them, or being received for them."""
        held = sum(pending.nbytes for pending in self._by_ref.values())
        return held + self._receiving_bytes + self._matrices.nbytes

    @contextmanager
    def receiving(self, nbytes: int, metadata: dict[str, str]) -> Iterator[None]:
        """Count what the block receives as held; what would not fit is refused before it is received.

        Raises:
            QueueFull: If `nbytes` more would exceed the limit.
        """
        self._require_room(nbytes, metadata)
        self._receiving_bytes += nbytes
        try:
            yield
        finally:
            self._receiving_bytes -= nbytes

    async def acquire_matrix(self, ref: SuperBatchRef, size: int, datatype: str) -> SpilledMatrix:
        """Return the super-batch's pair-loss matrix, opened now unless another rank's call did.

        The caller releases it, or adds it to the pending selection as a rank's outputs, which `drop` releases.

        Raises:
            QueueFull: If there is no room for it.
            Conflict: If another rank sends losses of another datatype.
        """
        return await self._matrices.acquire(ref, size, datatype, self._require_room)

    def release_matrix(self, ref: SuperBatchRef, matrix: SpilledMatrix) -> None:
        """Drop one reference to a pair-loss matrix; the last one frees its disk space."""
        self._matrices.release(ref, matrix)

    def find(self, ref: SuperBatchRef) -> PendingSelection | None:
        """Return the super-batch's pending selection if a rank's outputs have arrived."""
        return self._by_ref.get(ref)

    def join(
        self, ref: SuperBatchRef, world_size: int, on_first: Callable[[PendingSelection], None]
    ) -> PendingSelection:
        """Return the super-batch's pending selection; call `on_first` with it if this call made it."""
        pending = self._by_ref.get(ref)
        if pending is None:
            pending = self._by_ref[ref] = PendingSelection(ref, world_size)
            on_first(pending)
        return pending

    def drop(self, pending: PendingSelection) -> None:
        """Release a pending selection that has its outcome, and what it held."""
        if self._by_ref.pop(pending.ref, None) is None:
            return
        for held in pending.outputs.values():
            if isinstance(held.outputs, SpilledMatrix):
                self.release_matrix(pending.ref, held.outputs)

    def _require_room(self, nbytes: int, metadata: dict[str, str]) -> None:
        if self.held_bytes and self.held_bytes + nbytes > self._max_held_bytes:
            raise QueueFull(
                f"learner outputs of {self.held_bytes} bytes are held for undecided selections, "
                f"{nbytes} more would exceed the limit of {self._max_held_bytes}",
                metadata | {"limit": "JEST_MAX_HELD_BYTES"},
                retry_after_s=HELD_FULL_RETRY_S,
            )


def _tensors(outputs: RankOutputs) -> list[torch.Tensor]:
    """Return what is held in memory for one rank alone."""
    match outputs:
        case Embeddings(image=image, text=text):
            return [image, text]
        case LossesOfModels(learner=learner, reference=reference):
            return [losses.values for losses in (learner, reference) if losses is not None]
    return []


def _fit(outputs: RankOutputs, others: RankOutputs) -> bool:
    """Return whether two ranks' outputs can be of one learner; rounding may have moved scale and bias a little."""
    one, other = _kind(outputs), _kind(others)
    same = all(one[name] == other[name] for name in one if name not in ("scale", "bias"))
    return same and all(
        math.isclose(one[n], other[n], rel_tol=1e-4, abs_tol=1e-6) for n in ("scale", "bias") if n in one
    )


def _kind(outputs: RankOutputs) -> dict[str, Any]:
    """Return what has to be the same on all ranks."""
    kind: dict[str, Any] = {"dtypes": [str(t.dtype).removeprefix("torch.") for t in _tensors(outputs)]}
    if isinstance(outputs, Embeddings):
        kind |= {"width": outputs.image.shape[1], "scale": outputs.scale, "bias": outputs.bias}
    return kind
