"""The door: what a caller passes is checked here, once, and turned into the tensors that the method works on.

Shapes: B = super-batch, b = sub-batch, W = ranks.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from jest_core.checks import require_positive_int
from jest_core.policy import SelectionPolicy
from jest_core.sampling import CandidatePool, Groups
from jest_core.types import Embeddings, ExampleLosses, ModelOutputs, PairLosses

SignedModels = list[tuple[ModelOutputs, int]]

_KIND_NAMES: dict[type[ModelOutputs], str] = {
    Embeddings: "embeddings",
    PairLosses: "pair losses",
    ExampleLosses: "example losses",
}
# What the learner, and what the reference, must bring for each loss.
_OUTPUTS: dict[str, tuple[tuple[type[ModelOutputs], ...], tuple[type[ModelOutputs], ...]]] = {
    "sigmoid": ((Embeddings,), (Embeddings,)),
    "softmax": ((Embeddings,), (Embeddings,)),
    "pairwise": ((PairLosses,), (Embeddings, PairLosses)),
    "per_example": ((ExampleLosses,), (ExampleLosses,)),
}


def signed_models(
    learner: ModelOutputs | None, reference: ModelOutputs | None, policy: SelectionPolicy
) -> SignedModels:
    """The models that the scoring needs, each with the sign of its loss in S."""
    given = zip(("learner", "reference"), (learner, reference), _OUTPUTS[policy.loss], policy.loss_signs, strict=True)
    models = []
    for name, outputs, accepted, sign in given:
        if sign == 0:
            continue
        if outputs is None:
            raise ValueError(f"{name} is None, but scoring {policy.scoring!r} needs its {_kinds(accepted)}")
        if not isinstance(outputs, accepted):
            raise ValueError(  # noqa: TRY004 - bad input is always ValueError
                f"{name} must bring its {_kinds(accepted)} under loss {policy.loss!r}, not {type(outputs).__name__}"
            )
        models.append((outputs, sign))
    devices = {str(outputs.device) for outputs, _ in models}
    if len(devices) > 1:
        raise ValueError(f"learner and reference must be on one device, not on {' and '.join(sorted(devices))}")
    return models


def resolve_super_batch_size(
    learner: ModelOutputs | None, reference: ModelOutputs | None, super_batch_size: int | None
) -> int:
    """B, on which everything that was given must agree."""
    sizes: dict[str, int] = {}
    for name, outputs in (("learner", learner), ("reference", reference)):
        if outputs is not None:
            sizes[name] = len(outputs)
    if super_batch_size is not None:
        require_positive_int("super_batch_size", super_batch_size)
        sizes["super_batch_size"] = super_batch_size
    if not sizes:
        raise ValueError("super_batch_size must be given when there are no embeddings")
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} ({size})" for name, size in sizes.items())
        raise ValueError(f"the number of rows must be the same everywhere: {found}")
    return next(iter(sizes.values()))


def candidate_pool(
    policy: SelectionPolicy,
    size: int,
    example_keys: Sequence[Hashable] | Tensor | None,
    rank_of_row: Tensor | None,
    group_labels: Sequence[Hashable] | Tensor | None,
    device: torch.device,
) -> CandidatePool:
    """All rows, ready to be chosen from, once it is sure that the sub-batch can be filled."""
    sub_batch_size = policy.resolve_sub_batch_size(size)
    codes_B, num_keys = _codes("example_keys", "key", example_keys, size)
    ranks_B, world_size = _ranks(rank_of_row, size)
    groups = _groups(group_labels, policy.max_per_group, size)
    if num_keys < sub_batch_size:
        raise ValueError(
            f"the super-batch ({size} rows) has {num_keys} distinct example keys, "
            f"fewer than the sub-batch ({sub_batch_size}){_same_rows_hint(num_keys, size, world_size)}"
        )
    if policy.placement == "global":
        ranks_B, world_size = torch.zeros_like(ranks_B), 1
    share, rest = divmod(sub_batch_size, world_size)
    if rest:
        raise ValueError(
            f"the sub-batch ({sub_batch_size}) must be divisible by the number of ranks ({world_size}) under placement "
            f"'per_rank': choose {sub_batch_size - rest} or {sub_batch_size - rest + world_size}, or placement 'global'"
        )
    pool = CandidatePool(codes_B, num_keys, ranks_B, world_size, groups, device)
    pool.require_enough([share] * world_size)
    return pool


def _same_rows_hint(num_keys: int, size: int, world_size: int) -> str:
    """Name the usual cause where every rank may have brought the same rows."""
    if world_size == 1 or num_keys * world_size > size:
        return ""
    return f"; if all {world_size} ranks load the same rows, give their DataLoaders a DistributedSampler"


def chosen_rows(chosen: Sequence[int] | Tensor, size: int) -> Tensor:
    """`chosen` as int64, if it is a set of rows of the super-batch."""
    rows = torch.as_tensor(chosen) if len(chosen) else torch.empty(0, dtype=torch.int64)
    if rows.ndim != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"chosen must be a list of row numbers, not {rows.dtype} of shape {list(rows.shape)}")
    outside = rows[(rows < 0) | (rows >= size)]
    if len(outside):
        raise ValueError(f"chosen holds row {int(outside[0])}, outside the super-batch of {size} rows")
    if len(torch.unique(rows)) < len(rows):
        raise ValueError("chosen must not hold a row twice")
    return rows.long()


def _codes(name: str, noun: str, values: Sequence[Hashable] | Tensor | None, size: int) -> tuple[Tensor, int]:
    """int64 [B] on the CPU, equal for equal values and from 0 upwards without a gap; and how many there are."""
    if values is None:
        return torch.arange(size), size
    if isinstance(values, str | bytes):
        raise ValueError(f"{name} must hold one {noun} for each row, not be a single string")  # noqa: TRY004 - bad input is always ValueError
    if isinstance(values, Tensor):
        _require_int64_column(name, values, size)
        distinct, codes_B = torch.unique(values.cpu(), return_inverse=True)
        return codes_B, len(distinct)
    if len(values) != size:
        raise ValueError(f"{name} has {len(values)} {noun}s for a super-batch of {size} rows")
    codes: dict[Hashable, int] = {}
    try:
        codes_B = torch.tensor([codes.setdefault(value, len(codes)) for value in values])
    except TypeError as error:
        raise ValueError(f"{name} must be hashable: {error}") from error
    return codes_B, len(codes)


def _groups(labels: Sequence[Hashable] | Tensor | None, limit: int | None, size: int) -> Groups | None:
    """None where nothing is limited; a label of None is no group."""
    if labels is None:
        if limit is not None:
            raise ValueError(f"group_labels must be given, because max_per_group is {limit}")
        return None
    codes_B, _ = _codes("group_labels", "label", labels, size)
    if limit is None:
        return None
    if not isinstance(labels, Tensor):
        codes_B[torch.tensor([label is None for label in labels])] = -1
    return Groups(codes_B, limit)


def _ranks(rank_of_row: Tensor | None, size: int) -> tuple[Tensor, int]:
    """int64 [B] and the number of ranks W."""
    if rank_of_row is None:
        return torch.zeros(size, dtype=torch.int64), 1
    _require_int64_column("rank_of_row", rank_of_row, size)
    present = torch.unique(rank_of_row).tolist()
    if present != list(range(len(present))):
        raise ValueError(f"rank_of_row must hold every rank from 0 to W - 1, not {_abridged(present)}")
    return rank_of_row.cpu(), len(present)


def _require_int64_column(name: str, values: object, size: int) -> None:
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(values).__name__}")  # noqa: TRY004 - as above
    if values.shape != (size,) or values.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 of shape [{size}], not {values.dtype} of shape {list(values.shape)}")


def _kinds(accepted: tuple[type[ModelOutputs], ...]) -> str:
    return " or ".join(_KIND_NAMES[kind] for kind in accepted)


def _abridged(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"
