"""From what all ranks brought to each rank's positions: from the server's vocabulary into `jest_core` and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from jest_core import Embeddings, ExampleLosses, PairLosses, select_sub_batch
from jest_server.domain.policies import policy_of
from jest_server.selector.learner_outputs.pending_selections import LossesOfModels
from jest_server.selector.learner_outputs.spilled_matrix import SpilledMatrix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_core import Selection, SelectionPolicy
    from jest_core.types import ModelOutputs
    from jest_server.domain.decisions import Decision
    from jest_server.domain.policies import Fallback, PolicySpec
    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.super_batches import Submission
    from jest_server.selector.learner_outputs.pending_selections import LearnerOutputs, RankOutputs

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class SelectionTask:
    """A selection to make: by which policy, with which seed, at which step, from what the ranks brought."""

    spec: PolicySpec
    seed: int
    step: int
    submissions: Mapping[int, Submission]
    outputs: Mapping[int, LearnerOutputs]
    reference: tuple[ReferenceInfo, torch.Tensor] | None
    """The reference model and its embeddings `[2, B, D]` f16, ranks one after the other; None where the policy needs
    none, or under a fallback."""

    @property
    def ranks(self) -> range:
        """All ranks, in order."""
        return range(len(self.submissions))

    @property
    def rows(self) -> list[int]:
        """How many rows each rank has."""
        return [len(self.submissions[rank].keys) for rank in self.ranks]

    def policy(self) -> SelectionPolicy:
        """Return the policy of this step.

        Raises:
            ValueError: If it is impossible at this step, e.g. because too few rows are left for its chunks.
        """
        policy = policy_of(self.spec)
        return policy.at_step(self.step, sum(self.rows), len(self.rows))

    def cost(self) -> float:
        """Estimate the work, in multiplications: rows times selected rows times the widths of the models that count.

        Raises:
            ValueError: As `policy`.
        """
        rows = sum(self.rows)
        width = sum(tensor.shape[-1] for tensor in _matrices(self, policy_of(self.spec)))
        return float(rows) * self.policy().resolve_sub_batch_size(rows) * max(1, width)


@dataclass(frozen=True)
class SelectionResult:
    """The sub-batch by rank, and the state of the sampler behind it."""

    positions: dict[int, tuple[int, ...]]
    weights: dict[int, tuple[float, ...]] | None
    sub_batch_size: int
    gain: float
    perplexity: tuple[float, ...]
    learnability: tuple[float, float] | None = None
    """Of a row's own pair, in nats: mean of the rows selected, and of the rows dropped. None under other scorings."""


def effective_policy(policy: PolicySpec, fallback: Fallback | None) -> PolicySpec:
    """Return the policy that selects: the job's own, or with its fallback's scoring."""
    return policy if fallback is None else policy.model_copy(update={"scoring": fallback})


def select(task: SelectionTask, device: torch.device) -> SelectionResult:
    """Select a sub-batch; the same task always has the same result.

    Computed on `device`, except from pair losses: they are read where they lie, and the CPU does that.

    Raises:
        ValueError: If no sub-batch can be selected, e.g. because too few keys are distinct.
    """
    policy = task.policy()
    where = CPU if policy.loss == "pairwise" else device
    rows = torch.tensor(task.rows)
    submissions = [task.submissions[rank] for rank in task.ranks]
    selection = select_sub_batch(
        _learner(task, policy, where),
        _reference(task, policy, where),
        policy,
        seed=task.seed,
        example_keys=[key for submission in submissions for key in submission.keys],
        rank_of_row=torch.repeat_interleave(torch.arange(len(rows)), rows),
        group_labels=_labels(submissions) if policy.max_per_group is not None else None,
        super_batch_size=int(rows.sum()),
    )
    starts = torch.cumsum(rows, 0) - rows
    owner = torch.bucketize(selection.positions, starts, right=True) - 1
    local = selection.positions - starts[owner]
    weights = selection.weights
    assert isinstance(policy.gain, float | int)
    return SelectionResult(
        positions={r: tuple(local[owner == r].tolist()) for r in task.ranks},
        weights=None if weights is None else {r: tuple(weights[owner == r].tolist()) for r in task.ranks},
        sub_batch_size=len(selection.positions),
        gain=float(policy.gain),
        perplexity=selection.perplexity,
        learnability=_learnability(policy, selection),
    )


def replay(
    decision: Decision,
    submissions: Mapping[int, Submission],
    outputs: Mapping[int, LearnerOutputs],
    reference: tuple[ReferenceInfo, torch.Tensor] | None,
    device: torch.device,
) -> SelectionResult:
    """Compute a recorded decision again, from its record and its inputs alone."""
    spec = effective_policy(decision.policy, decision.fallback)
    return select(SelectionTask(spec, decision.seed, decision.step, submissions, outputs, reference), device)


def _learnability(policy: SelectionPolicy, selection: Selection) -> tuple[float, float] | None:
    known = policy.scoring == "learnability" and all(map(math.isfinite, selection.mean_own_scores))
    return selection.mean_own_scores if known else None


def _learner(task: SelectionTask, policy: SelectionPolicy, device: torch.device) -> ModelOutputs | None:
    if not policy.scores_learner:
        return None
    first = task.outputs[0].outputs
    if isinstance(first, SpilledMatrix):
        return PairLosses(first.values)
    if isinstance(first, Embeddings):
        parts = [part for part in _parts(task) if isinstance(part, Embeddings)]
        return Embeddings(
            image=torch.cat([part.image for part in parts]).to(device),
            text=torch.cat([part.text for part in parts]).to(device),
            scale=first.scale,
            bias=first.bias,
        )
    return _example_losses(task, "learner", device)


def _reference(task: SelectionTask, policy: SelectionPolicy, device: torch.device) -> ModelOutputs | None:
    if not policy.scores_reference:
        return None
    if policy.loss == "per_example":
        return _example_losses(task, "reference", device)
    assert task.reference is not None
    info, joined = task.reference
    image, text = joined.to(device).unbind(0)
    return Embeddings(image, text, scale=info.scale, bias=info.bias)


def _example_losses(task: SelectionTask, model: str, device: torch.device) -> ExampleLosses:
    losses = [getattr(part, model) for part in _parts(task) if isinstance(part, LossesOfModels)]
    return ExampleLosses(torch.cat([part.values for part in losses]).to(device))


def _parts(task: SelectionTask) -> list[RankOutputs]:
    return [task.outputs[rank].outputs for rank in task.ranks]


def _labels(submissions: Sequence[Submission]) -> list[str | None]:
    return [label or None for submission in submissions for label in submission.group_labels]


def _matrices(task: SelectionTask, policy: SelectionPolicy) -> list[torch.Tensor]:
    """Return one matrix of embeddings of each model that counts."""
    first = task.outputs[0].outputs
    learner = [first.image] if policy.scores_learner and isinstance(first, Embeddings) else []
    reference = [task.reference[1]] if policy.needs_reference_model and task.reference is not None else []
    return learner + reference
