"""Shards of reference embeddings for tests, written as `jest-server embed` writes them."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import numpy as np

from jest_server.domain.references import ReferenceInfo
from jest_server.stores.embedding_files.folder import EmbeddingFolder
from jest_server.stores.embedding_files.format import Manifest, Origin, pack, space_of

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 4


def reference_info(**fields: object) -> ReferenceInfo:
    """Returns a model that no other test uses."""
    values = {"name": uuid.uuid4().hex, "version": "1", "preprocessing_id": "p", "scale": 1.0, "bias": 0.0}
    return ReferenceInfo.model_validate(values | {"embedding_width": WIDTH, "inputs": ()} | fields)


def origin_of(reference: ReferenceInfo, source: str = "data/000.tar") -> Origin:
    """Returns where a shard of the model's embeddings comes from."""
    return Origin(
        model=reference.name,
        version=reference.version,
        preprocessing_id=reference.preprocessing_id,
        width=reference.embedding_width,
        source=source,
        source_bytes=1,
        key="{key}",
        caption="txt",
    )


def embeddings_of(keys: Sequence[str], *, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Returns random embeddings, ``[n, 2, width]`` f16."""
    return np.random.default_rng(seed).standard_normal((len(keys), 2, width)).astype(np.float16)


def packed(reference: ReferenceInfo, values: dict[str, np.ndarray], source: str) -> tuple[Manifest, bytes]:
    """Makes a shard of embeddings, ``[2, width]`` f16 by key."""
    rows = np.array(list(values.values()), np.float16).reshape(-1, 2, reference.embedding_width)
    return pack(origin_of(reference, source), list(values), rows, preprocess="m:f", left_out={})


def write_shard(
    url: str, reference: ReferenceInfo, values: dict[str, np.ndarray], source: str = "data/000.tar"
) -> Manifest:
    """Writes a shard below ``url``."""
    manifest, data = packed(reference, values, source)
    EmbeddingFolder(url, space_of(reference)).write(manifest, data)
    return manifest
