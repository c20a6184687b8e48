from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

import jest_trainer as jest
from jest_trainer._loop.learner import Learner


def unit():
    return torch.tensor([[0.6, 0.8], [1.0, 0.0]])


def embedded(outputs, *, loss="sigmoid", rows=2, world_size=1):
    policy = jest.SelectionPolicy(loss=loss, sub_batch_size=1, num_chunks=1)
    return Learner(lambda _batch: outputs).outputs(None, rows=rows, policy=policy, world_size=world_size)


def test_the_learner_runs_without_gradients():
    weight = torch.ones(2, 2, requires_grad=True)

    def embed(batch):
        assert not torch.is_grad_enabled()
        rows = functional.normalize(unit() @ weight)
        return jest.Embeddings(rows, rows, scale=1.0)

    policy = jest.SelectionPolicy(sub_batch_size=1, num_chunks=1)
    assert not Learner(embed).outputs(None, rows=2, policy=policy, world_size=1).image.requires_grad
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


POLICY = jest.SelectionPolicy(sub_batch_size=1, num_chunks=1)


def run(embed, times=1, **options):
    learner = Learner(embed, **options)
    for _ in range(times):
        learner.outputs(torch.ones(2, 2), rows=2, policy=POLICY, world_size=1)


def embeddings(_batch=None, *, scale=10.0, image=None):
    return jest.Embeddings(unit() if image is None else image, unit(), scale=scale)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (embeddings(image=unit() * 1.02), r"image embeddings are not normalised: a row has length 1.02, .*normalize"),
        (jest.Embeddings(unit(), unit() * 0.5, 1.0), "text embeddings are not normalised: a row has length 0.5,"),
        (embeddings(scale=2.302585), r"scale \(2.303\) looks like a logarithm: .* log of 10.*logit_scale.exp"),
        (embeddings(scale=2.6593), r"scale \(2.659\) looks like a logarithm: .* log of 14.29"),
        (embeddings(scale=4.6052), r"scale \(4.605\) looks like a logarithm: .* log of 100"),
    ],
)
def test_outputs_that_look_wrong_are_warned_of_once_for_each_loop(outputs, message):
    with pytest.warns(UserWarning, match=message) as caught:
        run(lambda _batch: outputs, times=3)
    assert len(caught) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalised_rows_of_any_dtype_give_no_warning(dtype):
    rows = functional.normalize(torch.randn(100, 64)).to(dtype)
    outputs = jest.Embeddings(rows, rows, scale=1.0)
    Learner(lambda _batch: outputs).outputs(None, rows=100, policy=POLICY, world_size=1)


def test_only_a_sample_of_a_large_super_batch_is_measured():
    rows = functional.normalize(torch.ones(1600, 2))
    rows[1] = 5.0
    Learner(lambda _batch: jest.Embeddings(rows, rows, 1.0)).outputs(None, rows=1600, policy=POLICY, world_size=1)


class Tower(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(2, 2), norm)

    def embed(self, batch):
        self.visual(batch)
        return embeddings()

    forward = embed


class Codebook(nn.Module):
    """Replaces a buffer in train mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, batch):
        if self.training:
            self.mean = self.mean * 0.9 + batch.mean(0) * 0.1
        return batch


def closure(tower):
    def embed(batch):
        return tower(batch)

    return embed


def attribute(tower):
    trainer = SimpleNamespace(net=tower)

    def embed(batch):
        return trainer.net(batch)

    return embed


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (closure, "tower.visual.1"),
        (attribute, "trainer.net.visual.1"),
        (lambda tower: tower, "Tower.visual.1"),
        (lambda tower: tower.embed, "self.visual.1"),
        (lambda tower: functools.partial(closure(tower)), "tower.visual.1"),
        (lambda tower: torch.no_grad()(closure(tower)), "tower.visual.1"),
    ],
)
def test_a_batch_norm_that_counts_super_batches_is_found_and_named(make, name):
    with pytest.warns(
        UserWarning, match=f"^{name} updated running statistics in embed: .* eval_in_embed=True"
    ) as caught:
        run(make(Tower(nn.BatchNorm1d(2))), times=2)
    assert len(caught) == 1


def test_a_module_that_replaces_its_statistics_is_found_too():
    with pytest.warns(UserWarning, match="^visual.1 updated"):
        run(closure(tower := Tower(Codebook())), model=tower)


@pytest.mark.parametrize("norm", [nn.LayerNorm(2), nn.BatchNorm1d(2, track_running_stats=False), nn.Dropout()])
def test_modules_without_running_statistics_give_no_warning(norm):
    run(closure(Tower(norm)))


def test_a_batch_norm_in_eval_mode_gives_no_warning():
    run(closure(Tower(nn.BatchNorm1d(2)).eval()))


class Rewriting(nn.Module):
    """Writes to a buffer what it holds already, as DistributedDataParallel does before each forward pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((2, 2), -torch.inf))

    def forward(self, batch):
        self.mask.copy_(self.mask.clone())
        return batch


def test_buffers_that_are_written_but_not_changed_give_no_warning():
    run(closure(Tower(Rewriting())))


@pytest.mark.parametrize("wrap", [lambda tower: tower, lambda tower: torch.compile(tower, backend="eager")])
def test_eval_in_embed_puts_each_module_back_into_the_mode_that_it_was_in(wrap):
    tower = Tower(nn.BatchNorm1d(2))
    tower.visual[0].eval()
    model = wrap(tower)

    def embed(batch):
        assert not any(module.training for module in model.modules())
        return tower(batch)

    run(embed, model=model, eval_in_embed=True)
    assert model.training
    assert tower.training
    assert tower.visual[1].training
    assert not tower.visual[0].training
    assert tower.visual[1].num_batches_tracked == 0


def test_eval_in_embed_ends_with_an_error_of_embed_too():
    tower = Tower(nn.BatchNorm1d(2))
    with pytest.raises(ZeroDivisionError):
        run(lambda _batch: 1 / 0, model=tower, eval_in_embed=True)
    assert tower.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_in_embed": True}, "model must be given: eval_in_embed=True"),
        ({"model": lambda batch: batch}, "model must be a torch.nn.Module, not function"),
    ],
)
def test_eval_in_embed_without_a_model_and_what_is_not_a_module_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Learner(embeddings, **options)


def test_a_compiled_model_is_compiled_once_although_it_is_watched():
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    tower = torch.compile(Tower(nn.LayerNorm(2)).visual, backend=backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        run(lambda batch: tower(batch) is None or embeddings(), times=3)
    assert len(compiled) == 1
