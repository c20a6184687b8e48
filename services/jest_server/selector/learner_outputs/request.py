"""One rank's call for a selection."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from jest_server.domain.super_batches import RankRef
from jest_server.selector.learner_outputs.header import digest_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jest_proto.v1 import selection_pb2

ANSWER_MARGIN_S = 0.25
"""How long before its deadline a caller is answered with the reason why there is no decision yet."""


@dataclass(frozen=True)
class SelectRequest(RankRef):
    """What a rank announces of its learner's outputs for a super-batch, and until when it waits for the selection."""

    world_size: int
    header: selection_pb2.SelectSubBatchHeader
    deadline_s: float
    """On the clock of `time.monotonic`."""
    last_step_s: Mapping[str, float] | None = None
    """Seconds by phase of the rank's last training step, if its trainer reports them."""

    @cached_property
    def digest(self) -> str:
        """Names the announced content; equal for a retry."""
        return digest_of(self.header)

    @property
    def patience_s(self) -> float:
        """Seconds that the call may still wait."""
        return max(self.deadline_s - time.monotonic() - ANSWER_MARGIN_S, 0.0)
