"""From joined embeddings to each rank's positions: the step from the server's vocabulary into jest_core and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from jest_core import Embeddings, select_sub_batch, selection_seed
from jest_server.selector.jobs import policy_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jest_server.model import JobSpec, ReferenceInfo
    from jest_server.selector.assembly import LearnerOutputs

LEARNER_SCORINGS = frozenset({"learnability", "hard_learner"})
REFERENCE_SCORINGS = frozenset({"learnability", "easy_reference"})


@dataclass(frozen=True)
class Chosen:
    """The sub-batch by rank, and what the sampler was like."""

    positions: dict[int, tuple[int, ...]]
    sub_batch_size: int
    perplexity: tuple[float, ...]


def choose(
    spec: JobSpec,
    super_batch_id: str,
    outputs: Mapping[int, LearnerOutputs],
    keys: Mapping[int, Sequence[str]],
    reference: tuple[ReferenceInfo, torch.Tensor] | None,
    device: torch.device,
) -> Chosen:
    """Chooses a sub-batch; the same arguments always give the same answer.

    Args:
        spec: The job.
        super_batch_id: Seeds the choice together with the job's seed.
        outputs: The learner's embeddings of every rank.
        keys: The example keys of every rank.
        reference: The reference model and its embeddings ``[B, 2, D]`` f16, ranks one after the other; None makes the
            job's fallback choose.
        device: Where to compute.

    Raises:
        ValueError: If no sub-batch can be chosen, e.g. because too few keys are distinct.
    """
    policy = policy_of(spec.policy)
    if reference is None and policy.scoring in REFERENCE_SCORINGS:
        assert spec.fallback != "fail"
        policy = replace(policy, scoring=spec.fallback)
    ranks = range(spec.world_size)
    learner_embeddings = reference_embeddings = None
    if policy.scoring in LEARNER_SCORINGS:
        parts = [outputs[r].embeddings for r in ranks]
        learner_embeddings = Embeddings(
            image=torch.cat([part.image for part in parts]).to(device),
            text=torch.cat([part.text for part in parts]).to(device),
            scale=parts[0].scale,
            bias=parts[0].bias,
        )
    if policy.scoring in REFERENCE_SCORINGS:
        assert reference is not None
        info, joined = reference
        image, text = joined.to(device).unbind(1)
        reference_embeddings = Embeddings(image.contiguous(), text.contiguous(), scale=info.scale, bias=info.bias)
    rows = torch.tensor([len(keys[r]) for r in ranks])
    selection = select_sub_batch(
        learner_embeddings,
        reference_embeddings,
        policy,
        seed=selection_seed(spec.seed, super_batch_id),
        example_keys=[key for r in ranks for key in keys[r]],
        rank_of_row=torch.repeat_interleave(torch.arange(spec.world_size), rows),
        super_batch_size=int(rows.sum()),
    )
    starts = torch.cumsum(rows, 0) - rows
    owner = torch.bucketize(selection.positions, starts, right=True) - 1
    local = selection.positions - starts[owner]
    return Chosen(
        positions={r: tuple(local[owner == r].tolist()) for r in ranks},
        sub_batch_size=len(selection.positions),
        perplexity=selection.perplexity,
    )
