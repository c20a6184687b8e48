"""How a loop reads its batches: the caller's functions in one value, with what they return checked and converted."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from jest_trainer._loop.learner import embed_super_batch
from jest_trainer._loop.take_rows import take_rows
from jest_trainer._rpc.features import check_features
from jest_trainer._rpc.keys import key_strings, label_strings, source_strings
from jest_trainer.outputs import scoring_and_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from jest_core import SelectionPolicy
    from jest_trainer._rpc.features import Array
    from jest_trainer.job import Job
    from jest_trainer.outputs import LearnerOutputs
    from jest_trainer.results import SubBatch

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReader(Generic[Batch]):
    """The functions and the key that were given to `SelectedBatches`, where they are described."""

    keys: Callable[[Batch], Iterable[Any]]
    embed: Callable[[Batch], LearnerOutputs]
    features: Callable[[Batch], Mapping[str, Array]] | None = None
    sources: Callable[[Batch], Iterable[str | None]] | None = None
    group_labels: Callable[[Batch], Iterable[Any]] | None = None
    take: Callable[[Batch, Tensor], Batch] | None = None
    decision_key: str | None = None

    def require_inputs_of(self, policy: SelectionPolicy) -> None:
        """Raise a ValueError if the policy needs something that no function reads."""
        if policy.max_per_group is not None and self.group_labels is None:
            raise ValueError(f"group_labels must be given: the job's policy has max_per_group={policy.max_per_group}")
        if policy.needs_reference_model and self.features is None and self.sources is None:
            raise ValueError(f"features must be given: {scoring_and_loss(policy)} needs the reference model's inputs")

    def read_keys(self, batch: Batch) -> list[str]:
        """Return the key of each row."""
        return key_strings(self.keys(batch))

    def read_group_labels(self, batch: Batch, rows: int) -> list[str]:
        """Return the group of each row; none at all without `group_labels`."""
        return [] if self.group_labels is None else label_strings(self.group_labels(batch), rows)

    def read_sources(self, batch: Batch, rows: int) -> list[str]:
        """Return the source of each row; none at all without `sources`."""
        return [] if self.sources is None else source_strings(self.sources(batch), rows)

    def read_features(self, batch: Batch, rows: int, *, missing: int) -> Mapping[str, Array]:
        """Return the reference model's inputs of all rows, of which the server lacks `missing`."""
        if self.features is None:
            raise ValueError(f"features must be given: the server lacks {missing} rows of a super-batch")
        features = self.features(batch)
        check_features(features, rows)
        return features

    def read_outputs(self, batch: Batch, rows: int, job: Job) -> LearnerOutputs:
        """Return what the learner makes of all rows."""
        return embed_super_batch(self.embed, batch, rows=rows, policy=job.policy, world_size=job.world_size)

    def reduce(self, batch: Batch, rows: int, decision: SubBatch) -> Batch:
        """Return the batch with only the chosen rows, and with the decision if it has a key."""
        if self.take is not None:
            reduced = self.take(batch, decision.positions)
        else:
            reduced = take_rows(batch, decision.positions, rows)
        return reduced if self.decision_key is None else _with_item(reduced, self.decision_key, decision)


def _with_item(batch: Batch, key: str, decision: SubBatch) -> Batch:
    if not isinstance(batch, MutableMapping):
        raise ValueError(  # noqa: TRY004 - bad input is always ValueError
            f"decision_key ({key!r}) needs batches that are dictionaries, not {type(batch).__name__}; "
            "with_decisions() yields the decision beside a batch of any type"
        )
    if key in batch:
        raise ValueError(f"decision_key ({key!r}) is a key of the batch itself: {sorted(map(str, batch))}")
    like = copy.copy(batch)  # `take` may have returned the caller's own
    like[key] = decision
    return like
