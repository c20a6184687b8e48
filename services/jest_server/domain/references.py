"""Reference models, as their own configuration describes them."""

from __future__ import annotations

from jest_server.domain.frozen_model import FrozenModel


class ReferenceInput(FrozenModel):
    """One tensor that the reference model takes for an example; -1 in ``shape`` stands for any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ReferenceInfo(FrozenModel):
    """What the reference model's own configuration says about it."""

    name: str
    version: str
    preprocessing_id: str
    scale: float
    bias: float
    embedding_width: int
    inputs: tuple[ReferenceInput, ...]

    @property
    def value_bytes(self) -> int:
        """Size of one example's embeddings as they are cached and handed on: ``[2, D]`` f16."""
        return 2 * 2 * self.embedding_width


class Announced(FrozenModel):
    """A version of a reference model, as its scorers announced it."""

    reference: ReferenceInfo
    since_s: float
    """When it was announced for the first time, in seconds since 1970."""
    served: bool
    """Whether scorers serve it at the moment."""
