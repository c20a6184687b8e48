import numpy as np
import pytest

from jest_server.domain.errors import ReferenceMissing
from jest_server.domain.shards import ShardResult
from jest_server.domain.super_batches import SuperBatch
from jest_server.selector.decide import join_reference
from support.memory_stores.embedding_cache import MemoryEmbeddingCache
from support.super_batches import REFERENCE, submission

WIDTH = REFERENCE.embedding_width


def value(key):
    """The reference embeddings of a key: what they are does not matter, as long as no two keys have the same."""
    return np.random.default_rng(list(key.encode())).random((2, WIDTH)).astype(np.float16)


class Results:
    """A store of nothing but shard results."""

    def __init__(self, *shards, inferred=0):
        self._results = [ShardResult(keys, b"".join(value(k).tobytes() for k in keys), inferred) for keys in shards]

    async def get_results(self, ref):  # noqa: ARG002 - the signature is the port's
        return self._results


def super_batch(*keys_by_rank):
    submissions = {
        rank: submission("j", rank=rank, world_size=len(keys_by_rank), keys=keys)
        for rank, keys in enumerate(keys_by_rank)
    }
    return SuperBatch(
        job="j",
        super_batch_id="sb",
        world_size=len(keys_by_rank),
        reference=REFERENCE,
        created_at_s=0.0,
        step=0,
        submissions=submissions,
        uploads={},
        pending_shards=0,
    )


async def cache_of(*keys):
    cache = MemoryEmbeddingCache()
    await cache.put(REFERENCE, {key: value(key).tobytes() for key in keys})
    return cache


@pytest.mark.parametrize("copied_at_once", [1, 1 << 20])
async def test_every_rows_embeddings_come_from_its_shard_or_the_cache_in_row_order(monkeypatch, copied_at_once):
    monkeypatch.setattr(join_reference, "_COPY_BYTES", copied_at_once)
    rows = ("a", "b", "c"), ("d", "b", "e")
    store = Results(("c", "a"), ("e",), inferred=1)
    joined = await join_reference.join_reference(store, await cache_of("b", "d"), super_batch(*rows))
    expected = np.stack([value(key) for keys in rows for key in keys], axis=1)
    np.testing.assert_array_equal(joined.embeddings.numpy(), expected)
    assert (joined.inferences, joined.cache_hits) == (2, 4)


async def test_rows_without_embeddings_are_counted_duplicates_included():
    with pytest.raises(ReferenceMissing, match="3 of 4 rows"):
        await join_reference.join_reference(Results(("a",)), await cache_of(), super_batch(("a", "b", "b", "c")))
