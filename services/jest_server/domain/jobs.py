"""A training job: what its client decides about it, and its accounts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from jest_server.domain.frozen_model import FrozenModel
from jest_server.domain.policies import Fallback, PolicySpec

JobName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
"""What a client may call a job."""
ScopedJobName = Annotated[
    str, StringConstraints(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,62}~)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
]
"""What the server calls it: a tenant's jobs bear the tenant's name in front."""


class JobSpec(FrozenModel):
    """All that a client decides about a job."""

    name: ScopedJobName
    reference_model: str = Field(default="", max_length=256)
    """Empty: none; only where the policy needs none."""
    policy: PolicySpec
    world_size: int = Field(default=1, ge=1, le=4096)
    seed: int = Field(default=0, ge=0, lt=2**64)
    fallback: Fallback = "fail"
    reference_timeout_s: float = Field(default=30.0, gt=0, le=3600)
    max_in_flight: int = Field(default=64, ge=1, le=100_000)
    super_batch_ttl_s: float = Field(default=600.0, ge=1, le=7 * 86400)
    weight: float = Field(default=1.0, ge=0.001, le=1000)
    """Share of the scorers, relative to other jobs', while they all wait."""


class Job(FrozenModel):
    """A registered job."""

    spec: JobSpec
    created_at_s: float


class Counters(FrozenModel):
    """A job's accounts; submitted == selected + dead_lettered + in_flight at every moment."""

    submitted: int = 0
    selected: int = 0
    dead_lettered: int = 0
    in_flight: int = 0
    fallbacks: int = 0
    examples_loaded: int = 0
    examples_selected: int = 0
    cache_hits: int = 0
    reference_inferences: int = 0
