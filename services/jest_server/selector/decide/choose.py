"""From what all ranks brought to each rank's positions: from the server's vocabulary into jest_core and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from jest_core import Embeddings, ExampleLosses, PairLosses, select_sub_batch
from jest_server.domain.policies import policy_of
from jest_server.selector.learner_outputs.pending import LossesOfModels
from jest_server.selector.learner_outputs.spilled_matrix import ScratchMatrix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_core import Selection, SelectionPolicy
    from jest_core.types import ModelOutputs
    from jest_server.domain.decisions import Decision
    from jest_server.domain.policies import Fallback, PolicySpec
    from jest_server.domain.references import ReferenceInfo
    from jest_server.domain.super_batches import Submission
    from jest_server.selector.learner_outputs.pending import LearnerOutputs, RankOutputs

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Inputs:
    """All that a choice is made from, by rank.

    ``reference`` is the reference model and its embeddings ``[2, B, D]`` f16, ranks one after the other;
    None where the policy needs none, or a fallback chooses.
    """

    submissions: Mapping[int, Submission]
    outputs: Mapping[int, LearnerOutputs]
    reference: tuple[ReferenceInfo, torch.Tensor] | None

    @property
    def ranks(self) -> range:
        """All ranks, in order."""
        return range(len(self.submissions))

    @property
    def rows(self) -> list[int]:
        """How many rows each rank has."""
        return [len(self.submissions[rank].keys) for rank in self.ranks]


@dataclass(frozen=True)
class Chosen:
    """The sub-batch by rank, and what the sampler was like."""

    positions: dict[int, tuple[int, ...]]
    weights: dict[int, tuple[float, ...]] | None
    sub_batch_size: int
    gain: float
    perplexity: tuple[float, ...]
    learnability: tuple[float, float] | None = None
    """Of a row's own pair, in nats: mean of the rows chosen, and of the rows dropped. None where they were chosen by
    something else."""


@dataclass(frozen=True, eq=False)
class Question:
    """A choice to make: by which rule, with which seed, at which step, from what."""

    spec: PolicySpec
    seed: int
    step: int | None
    inputs: Inputs

    def policy(self) -> SelectionPolicy:
        """Returns the rule of this step.

        Raises:
            ValueError: If it cannot hold, e.g. because too few rows are left for its chunks.
        """
        rows = self.inputs.rows
        policy = policy_of(self.spec)
        return policy if self.step is None else policy.at_step(self.step, sum(rows), len(rows))

    def cost(self) -> float:
        """Estimates the work, in multiplications: rows times chosen rows times the widths of the models that count.

        Raises:
            ValueError: As ``policy``.
        """
        rows = sum(self.inputs.rows)
        width = sum(tensor.shape[-1] for tensor in _matrices(policy_of(self.spec), self.inputs))
        return float(rows) * self.policy().resolve_sub_batch_size(rows) * max(1, width)


def rule(policy: PolicySpec, fallback: Fallback | None) -> PolicySpec:
    """Returns the policy that chooses: the job's own, or with its fallback's scoring."""
    return policy if fallback is None else policy.model_copy(update={"scoring": fallback})


def choose(question: Question, device: torch.device) -> Chosen:
    """Chooses a sub-batch; the same question always gets the same answer.

    It is made on ``device``, except from pair losses: they are read where they lie, and the CPU does that.

    Raises:
        ValueError: If no sub-batch can be chosen, e.g. because too few keys are distinct.
    """
    inputs, policy = question.inputs, question.policy()
    where = CPU if policy.loss == "pairwise" else device
    learner, reference = _learner(policy, inputs, where), _reference(policy, inputs, where)
    rows = torch.tensor(inputs.rows)
    submissions = [inputs.submissions[rank] for rank in inputs.ranks]
    selection = select_sub_batch(
        learner,
        reference,
        policy,
        seed=question.seed,
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
    return Chosen(
        positions={r: tuple(local[owner == r].tolist()) for r in inputs.ranks},
        weights=None if weights is None else {r: tuple(weights[owner == r].tolist()) for r in inputs.ranks},
        sub_batch_size=len(selection.positions),
        gain=float(policy.gain),
        perplexity=selection.perplexity,
        learnability=_learnability(policy, selection),
    )


def _learnability(policy: SelectionPolicy, selection: Selection) -> tuple[float, float] | None:
    known = policy.scoring == "learnability" and all(map(math.isfinite, selection.mean_own_scores))
    return selection.mean_own_scores if known else None


def replay(decision: Decision, inputs: Inputs, device: torch.device) -> Chosen:
    """Computes a recorded decision again, from its record and its inputs alone."""
    spec = rule(decision.policy, decision.fallback)
    return choose(Question(spec, decision.seed, decision.step, inputs), device)


def _learner(policy: SelectionPolicy, inputs: Inputs, device: torch.device) -> ModelOutputs | None:
    if not policy.scores_learner:
        return None
    parts = [inputs.outputs[rank].outputs for rank in inputs.ranks]
    first = parts[0]
    if isinstance(first, ScratchMatrix):
        return PairLosses(first.values)
    if isinstance(first, Embeddings):
        embeddings = [part for part in parts if isinstance(part, Embeddings)]
        return Embeddings(
            image=torch.cat([part.image for part in embeddings]).to(device),
            text=torch.cat([part.text for part in embeddings]).to(device),
            scale=first.scale,
            bias=first.bias,
        )
    return _example_losses(parts, "learner", device)


def _reference(policy: SelectionPolicy, inputs: Inputs, device: torch.device) -> ModelOutputs | None:
    if not policy.scores_reference:
        return None
    if policy.loss == "per_example":
        return _example_losses([inputs.outputs[rank].outputs for rank in inputs.ranks], "reference", device)
    assert inputs.reference is not None
    info, joined = inputs.reference
    image, text = joined.to(device).unbind(0)
    return Embeddings(image, text, scale=info.scale, bias=info.bias)


def _example_losses(parts: Sequence[RankOutputs], model: str, device: torch.device) -> ExampleLosses:
    losses = [getattr(part, model) for part in parts if isinstance(part, LossesOfModels)]
    return ExampleLosses(torch.cat([part.values for part in losses]).to(device))


def _labels(submissions: Sequence[Submission]) -> list[str | None]:
    return [label or None for submission in submissions for label in submission.group_labels]


def _matrices(policy: SelectionPolicy, inputs: Inputs) -> list[torch.Tensor]:
    """Returns one matrix of embeddings of each model that counts."""
    first = inputs.outputs[0].outputs
    learner = [first.image] if policy.scores_learner and isinstance(first, Embeddings) else []
    reference = [inputs.reference[1]] if policy.needs_reference_model and inputs.reference is not None else []
    return learner + reference
