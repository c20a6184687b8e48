"""A scorer with files of embeddings behind its cache."""

from __future__ import annotations

import numpy as np
from prometheus_client import CollectorRegistry

from jest_server.runtime.metrics import EmbeddingFileMetrics
from jest_server.stores.embedding_files.files import EmbeddingFiles
from jest_server.stores.tiered_cache import TieredEmbeddingCache
from support.embedding_shards import write_shard


async def test_what_is_in_files_is_not_computed(bench, tmp_path):
    """It may have come there after the selector had asked for the rows."""
    embedded = np.full((2, 4), 0.5, np.float16)
    write_shard(str(tmp_path), await bench.model.info(), {"a": embedded})
    files = EmbeddingFiles(str(tmp_path), EmbeddingFileMetrics(CollectorRegistry()))
    bench.cache = TieredEmbeddingCache(bench.cache, files)
    async with bench.working():
        result = await bench.scored(await bench.queue(["a", "b"], values=[5, 7]))
    assert (result.inferred, bench.model.embedded) == (1, [7])
    assert result.embeddings[: embedded.nbytes] == embedded.tobytes()
