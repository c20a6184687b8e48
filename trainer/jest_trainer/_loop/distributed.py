"""Which rank this process is, and of how many: what the caller says, else what torch.distributed says, else alone."""

from __future__ import annotations

from torch import distributed


def resolve_world_size(world_size: int | None) -> int:
    """The number of ranks.

    Raises:
        ValueError: `world_size` is not a number of ranks.
    """
    if world_size is None:
        return distributed.get_world_size() if _initialised() else 1
    if world_size < 1:
        raise ValueError(f"world_size ({world_size}) must be at least 1")
    return world_size


def resolve_rank(rank: int | None, world_size: int) -> int:
    """This process's rank in a job of `world_size` ranks.

    Raises:
        ValueError: the rank lies outside the job's world, or is not given and unknown.
    """
    if rank is None:
        if _initialised():
            if distributed.get_world_size() != world_size:
                raise ValueError(
                    f"rank must be given: the job has {world_size} ranks, "
                    f"torch.distributed {distributed.get_world_size()}"
                )
            return distributed.get_rank()
        if world_size > 1:
            raise ValueError(
                f"rank must be given: the job has {world_size} ranks, torch.distributed is not initialised"
            )
        return 0
    if not 0 <= rank < world_size:
        raise ValueError(f"rank ({rank}) must lie in [0, {world_size}), the job's world")
    return rank


def _initialised() -> bool:
    return distributed.is_available() and distributed.is_initialized()
