"""Two tiers as one cache: what the first lacks comes from files, and is in the first from then on."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from jest_server.domain.errors import StoreUnavailable
from jest_server.runtime.metrics import EmbeddingFileMetrics
from jest_server.runtime.settings import ProcessSettings
from jest_server.stores.embedding_files.files import EmbeddingFiles
from jest_server.stores.tiered_cache import TieredEmbeddingCache, with_embedding_files
from support.embedding_shards import embeddings_of, reference_info, write_shard
from support.memory_stores.embedding_cache import MemoryEmbeddingCache

WIDTH = 32
INFO = reference_info(embedding_width=WIDTH)
IN_FILES = {f"f{i}": row for i, row in enumerate(embeddings_of(range(20), width=WIDTH))}


class CountingFiles(EmbeddingFiles):
    """Remembers what it was asked for."""

    def __init__(self, url):
        super().__init__(url, EmbeddingFileMetrics(CollectorRegistry()))
        self.asked = []

    async def get(self, reference, keys):
        self.asked.append(list(keys))
        return await super().get(reference, keys)


@pytest.fixture
async def files(tmp_path):
    write_shard(str(tmp_path), INFO, IN_FILES)
    files = CountingFiles(str(tmp_path))
    yield files
    await files.close()


async def test_only_what_the_first_tier_lacks_is_read_and_only_once(files):
    cache = TieredEmbeddingCache(MemoryEmbeddingCache(), files)
    in_memory = bytes(INFO.value_bytes)
    await cache.put(INFO, {"m": in_memory})
    expected = [IN_FILES["f3"].tobytes(), in_memory, None, IN_FILES["f3"].tobytes()]
    assert await cache.get(INFO, ["f3", "m", "nobody", "f3"]) == expected
    assert await cache.get(INFO, ["f3", "m", "f3"]) == [expected[0], in_memory, expected[0]]
    assert files.asked == [["f3", "nobody"], []]


async def test_rows_of_files_are_rounded_as_the_first_tier_rounds(files):
    """So that a selection does not depend on where a row came from."""
    first, other = MemoryEmbeddingCache(precision="int8"), MemoryEmbeddingCache(precision="int8")
    cache = TieredEmbeddingCache(first, files)
    from_files = await cache.get(INFO, list(IN_FILES))
    fresh = await other.put(INFO, {key: value.tobytes() for key, value in IN_FILES.items()})
    assert from_files == list(fresh.values()) == await cache.get(INFO, list(IN_FILES))
    assert from_files != [value.tobytes() for value in IN_FILES.values()]


async def test_a_first_tier_that_is_away_is_told_as_before(files):
    class Away(MemoryEmbeddingCache):
        async def get(self, *_):
            raise StoreUnavailable("the cache does not answer")

    with pytest.raises(StoreUnavailable):
        await TieredEmbeddingCache(Away(), files).get(INFO, ["f3"])


async def test_without_a_url_the_cache_stays_as_it_is():
    cache = MemoryEmbeddingCache()
    assert with_embedding_files(cache, ProcessSettings(), EmbeddingFileMetrics(CollectorRegistry())) is cache


async def test_the_settings_name_the_files(tmp_path):
    write_shard(str(tmp_path), INFO, IN_FILES)
    settings = ProcessSettings(embeddings_url=str(tmp_path))
    cache = with_embedding_files(MemoryEmbeddingCache(), settings, EmbeddingFileMetrics(CollectorRegistry()))
    (value,) = await cache.get(INFO, ["f3"])
    assert np.array_equal(np.frombuffer(value, np.float16).reshape(2, WIDTH), IN_FILES["f3"])
    await cache.close()


def test_a_url_that_nothing_reads_is_refused_by_the_settings_name():
    settings = ProcessSettings(embeddings_url="nonsense://x")
    with pytest.raises(ValueError, match="JEST_EMBEDDINGS_URL: 'nonsense://x' is no path or URL"):
        with_embedding_files(MemoryEmbeddingCache(), settings, EmbeddingFileMetrics(CollectorRegistry()))


@pytest.mark.parametrize("field", ["embeddings_refresh_s", "embeddings_timeout_s"])
def test_a_period_that_cannot_be_is_refused(field):
    with pytest.raises(ValueError, match=rf"{field}\n.*greater than 0"):
        ProcessSettings(**{field: 0})
