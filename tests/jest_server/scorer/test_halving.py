from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, strategies

from jest_server.domain.errors import ReferenceModelError
from jest_server.reference.triton import TritonReferenceModel, TritonSettings
from jest_server.scorer.halving import MAX_EXTRA_PASSES, embed_by_halves
from support.references import put_in_mood, tiny_examples
from support.tiny_towers import Mood


class PickyModel:
    """Embeds x to [[x], [-x]]; fails on every batch that holds one of `bad`."""

    def __init__(self, bad, *, divisible=True):
        self.bad = set(bad)
        self.divisible = divisible
        self.works = True
        self.batches = []

    async def embed(self, inputs):
        rows = inputs["x"].tolist()
        self.batches.append(rows)
        if self.bad.intersection(rows):
            raise ReferenceModelError(f"failed on {rows}", retryable=True, divisible=self.divisible)
        return np.stack([inputs["x"], -inputs["x"]], 1).astype(np.float32)[:, :, None]

    async def ready(self):
        return self.works


async def embed(model, count):
    extra = []
    result = await embed_by_halves(model, {"x": np.arange(count)}, on_extra_pass=lambda: extra.append(1))
    assert len(extra) == len(model.batches) - 1
    return result


async def test_a_batch_that_works_takes_one_pass():
    model = PickyModel([])
    result = await embed(model, 9)
    assert [result.embeddings[row].tolist() for row in range(9)] == [[[row], [-row]] for row in range(9)]
    assert (result.failures, len(model.batches)) == ({}, 1)


@pytest.mark.parametrize(("bad", "passes"), [([77], 14), ([0], 14), ([1, 33, 65, 97], 46), ([6, 7], 14)])
async def test_the_search_takes_as_many_passes_as_it_says(bad, passes):
    model = PickyModel(bad)
    result = await embed(model, 128)
    assert sorted(result.failures) == bad
    assert len(model.batches) == 1 + passes


@given(count=strategies.integers(1, 40), bad=strategies.sets(strategies.integers(0, 39), max_size=3))
def test_exactly_the_bad_rows_fail_each_alone(count, bad):
    model, here = PickyModel(bad), {row for row in bad if row < count}
    result = asyncio.run(embed(model, count))
    assert result.failures.keys() == here
    assert {str(error) for error in result.failures.values()} == {f"failed on [{row}]" for row in here}
    assert result.embeddings.keys() == set(range(count)) - here
    assert all(result.embeddings[row].tolist() == [[row], [-row]] for row in result.embeddings)


@given(bad=strategies.sets(strategies.integers(0, 127)))
def test_however_many_rows_are_bad_the_passes_are_bounded_and_every_row_is_accounted_for(bad):
    model = PickyModel(bad)
    result = asyncio.run(embed(model, 128))
    assert len(model.batches) <= 1 + MAX_EXTRA_PASSES
    assert result.embeddings.keys() | result.failures.keys() == set(range(128))
    assert result.failures.keys() >= bad
    assert not result.failures.keys() & result.embeddings.keys()


async def test_a_failure_that_is_not_of_the_rows_is_not_searched():
    model = PickyModel([3], divisible=False)
    with pytest.raises(ReferenceModelError, match="failed on"):
        await embed(model, 8)
    assert len(model.batches) == 1


async def test_a_model_that_does_not_work_at_all_is_not_searched():
    model = PickyModel([3])
    model.works = False
    with pytest.raises(ReferenceModelError, match="failed on"):
        await embed(model, 8)
    assert len(model.batches) == 1


async def test_on_a_real_triton_bad_examples_of_every_kind_are_found_among_good_ones(triton):
    model = TritonReferenceModel(TritonSettings(triton.grpc_url))
    examples = tiny_examples(12)
    expected = await model.embed(examples)
    broken = {name: array.copy() for name, array in examples.items()}
    rules = {2: Mood.NAN, 7: Mood.ZERO, 10: Mood.HUGE}
    for row, mood in rules.items():
        put_in_mood(broken, row, mood)
    result = await embed_by_halves(model, broken, on_extra_pass=lambda: None)
    await model.close()
    assert result.failures.keys() == rules.keys()
    assert "has NaN or infinity in 1 of 1 rows" in str(result.failures[2])
    assert "has norms outside 0.01 to 1000 in 1 of 1 rows" in str(result.failures[7])
    assert "has values beyond float16 in 1 of 1 rows" in str(result.failures[10])
    for row, embedding in result.embeddings.items():
        np.testing.assert_allclose(embedding, expected[row], atol=1e-6)
