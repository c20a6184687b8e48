from __future__ import annotations

import pytest
import torch

import jest_trainer as jest
from jest_trainer.learner import embed_super_batch


def unit(dtype=torch.float32):
    return torch.tensor([[0.6, 0.8], [1.0, 0.0]], dtype=dtype)


def embedded(wire_dtype="as_is", dtype=torch.float32, rows=2):
    return embed_super_batch(
        lambda _batch: jest.Embeddings(unit(dtype), unit(dtype), scale=3.0, bias=1.0),
        None,
        rows=rows,
        wire_dtype=wire_dtype,
    )


def test_the_learner_runs_without_gradients():
    weight = torch.ones(2, 2, requires_grad=True)

    def embed(batch):
        assert not torch.is_grad_enabled()
        return jest.Embeddings(unit() @ weight, unit() @ weight, scale=1.0)

    assert not embed_super_batch(embed, None, rows=2, wire_dtype="as_is").image.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_as_is_leaves_the_element_type_alone(dtype):
    assert embedded(dtype=dtype).image.dtype == dtype


@pytest.mark.parametrize(("wire_dtype", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_wire_type_rounds_the_vectors_and_keeps_scale_and_bias(wire_dtype, dtype):
    result = embedded(wire_dtype)
    assert result.image.equal(unit().to(dtype))
    assert result.text.equal(unit().to(dtype))
    assert (result.scale, result.bias) == (3.0, 1.0)


def test_vectors_too_large_for_the_wire_type_are_refused():
    with pytest.raises(ValueError, match="image must be finite"):
        embed_super_batch(
            lambda _batch: jest.Embeddings(unit() * 1e5, unit(), scale=1.0), None, rows=2, wire_dtype="fp16"
        )


def test_something_else_than_embeddings_is_refused():
    with pytest.raises(ValueError, match=r"embed must return jest_trainer.Embeddings, not tuple"):
        embed_super_batch(lambda _batch: (unit(), unit()), None, rows=2, wire_dtype="as_is")


def test_another_number_of_rows_than_keys_is_refused():
    with pytest.raises(ValueError, match="embed returned 2 rows for a super-batch with 3 keys"):
        embedded(rows=3)
