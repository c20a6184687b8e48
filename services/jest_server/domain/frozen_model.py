"""The base of every immutable value that is stored or sent as JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """Immutable, strict about unknown fields, kept as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")
