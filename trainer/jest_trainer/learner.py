"""What the learner makes of a super-batch, in the element type in which it travels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from jest_core import Embeddings

if TYPE_CHECKING:
    from collections.abc import Callable

WireDtype = Literal["as_is", "fp16", "bf16"]
DTYPES = {"as_is": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@torch.no_grad()
def embed_super_batch(
    embed: Callable[[Any], Embeddings], super_batch: object, *, rows: int, wire_dtype: WireDtype
) -> Embeddings:
    """Run the learner without gradients.

    Raises:
        ValueError: it gave something else than finite Embeddings of `rows` rows.
    """
    embeddings = embed(super_batch)
    if not isinstance(embeddings, Embeddings):
        raise ValueError(f"embed must return jest_trainer.Embeddings, not {type(embeddings).__name__}")  # noqa: TRY004 - bad input is always ValueError
    if len(embeddings) != rows:
        raise ValueError(f"embed returned {len(embeddings)} rows for a super-batch with {rows} keys")
    dtype = DTYPES[wire_dtype]
    if dtype is None:
        return embeddings
    return replace(embeddings, image=embeddings.image.to(dtype), text=embeddings.text.to(dtype))
