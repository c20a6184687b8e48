from __future__ import annotations

import pytest
import torch

import jest_trainer as jest
from jest_trainer._loop.learner import embed_super_batch


def unit():
    return torch.tensor([[0.6, 0.8], [1.0, 0.0]])


def embedded(outputs, *, loss="sigmoid", rows=2, world_size=1):
    policy = jest.SelectionPolicy(loss=loss, sub_batch_size=1, num_chunks=1)
    return embed_super_batch(lambda _batch: outputs, None, rows=rows, policy=policy, world_size=world_size)


def test_the_learner_runs_without_gradients():
    weight = torch.ones(2, 2, requires_grad=True)

    def embed(batch):
        assert not torch.is_grad_enabled()
        return jest.Embeddings(unit() @ weight, unit() @ weight, scale=1.0)

    policy = jest.SelectionPolicy(sub_batch_size=1, num_chunks=1)
    assert not embed_super_batch(embed, None, rows=2, policy=policy, world_size=1).image.requires_grad
    assert torch.is_grad_enabled()


def test_another_kind_than_the_loss_wants_is_refused():
    with pytest.raises(
        ValueError, match=r"what embed returned must be jest_trainer.Embeddings, not tuple: .*'sigmoid'"
    ):
        embedded((unit(), unit()))


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [
        ("sigmoid", jest.Embeddings(unit(), unit(), scale=1.0)),
        ("pairwise", jest.PairLosses(torch.ones(2, 2))),
        ("per_example", jest.ExampleLosses(torch.ones(2), torch.ones(2))),
        ("per_example", jest.ExampleLosses(reference=torch.ones(2))),
    ],
)
def test_another_number_of_rows_than_keys_is_refused(loss, outputs):
    with pytest.raises(ValueError, match="embed returned 2 rows for a super-batch with 3 keys"):
        embedded(outputs, loss=loss, rows=3)
