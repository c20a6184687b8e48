"""Which rank this process is, of how many, and of which start: from arguments, torch.distributed or the scheduler."""

from __future__ import annotations

import os
import secrets

import torch
from torch import distributed

_NONCE_BYTES = 16


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


def resolve_launch(launch: str | None, world_size: int) -> str:
    """What all ranks of this start have in common, and no other start has; empty if that is unknown.

    With torch.distributed, rank 0 draws it and broadcasts it: every rank must call this at the same point of its main
    thread. Under Slurm it is the job, its step and the number of its restarts. An id that survives a restart, such as
    torchrun's run id, is not used.
    """
    if launch is not None:
        return launch
    if world_size > 1 and _initialised() and distributed.get_world_size() == world_size:
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        drawn = torch.tensor(list(secrets.token_bytes(_NONCE_BYTES)), dtype=torch.uint8, device=device)
        distributed.broadcast(drawn, src=0)
        return bytes(drawn.tolist()).hex()
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    if job and step:
        return f"slurm-{job}-{step}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return ""


def _initialised() -> bool:
    return distributed.is_available() and distributed.is_initialized()
