"""What a loop looks at more closely in its first super-batch: features, and the modules that `embed` runs."""

from __future__ import annotations

import pytest
from torch import nn
from trainer_samples import embeddings, super_batch


def super_batches(count):
    return (super_batch(step) for step in range(count))


def features_of(batch):
    return {"image": batch["image"], "tokens": batch["tokens"]}


def test_of_cached_rows_features_are_asked_for_once_to_be_checked_and_not_sent(server, make_loop):
    server.cached = {f"{step}-{row}" for step in range(3) for row in range(8)}
    asked = []
    list(make_loop(super_batches(3), features=lambda batch: asked.append(batch["step"]) or features_of(batch)))
    assert asked == [0]
    assert server.count("UploadExamples") == 0


def test_features_are_not_asked_for_when_all_rows_are_cached_and_have_sources(server, make_loop):
    server.cached = {f"0-{row}" for row in range(8)}
    sources = [f"https://data.example/{row}.png" for row in range(8)]
    list(make_loop(super_batches(1), features=lambda _batch: pytest.fail("asked for"), sources=lambda _batch: sources))
    assert server.count("UploadExamples") == 0


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"image": f["image"]}, r"features are \['image'\], expected \['image', 'tokens'\].*'reference'"),
        (lambda f: f | {"tokens": f["tokens"].long()}, r"features\['tokens'\] has dtype int64, .* takes int32"),
        (
            lambda f: f | {"image": f["image"][:, :2]},
            r"features\['image'\] has shape \[2, 2, 2\] per row, .* \[3, -1, -1\]",
        ),
    ],
)
def test_features_that_the_reference_model_does_not_take_are_refused_cached_or_not(
    server, make_loop, cached, change, message
):
    server.cached = {f"0-{row}" for row in range(8 if cached else 0)}
    with pytest.raises(ValueError, match=message):
        list(make_loop(super_batches(1), features=lambda batch: change(features_of(batch))))
    assert server.count("UploadExamples") == 0


class Normed(nn.Module):
    """Has a BatchNorm beside the embeddings that are returned."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, batch):
        self.norm(batch["row"][:, None].float())
        return embeddings(batch)


def test_running_statistics_that_count_super_batches_are_warned_of_once(make_loop):
    with pytest.warns(UserWarning, match="norm updated running statistics in embed") as caught:
        list(make_loop(super_batches(3), embed=Normed()))
    assert len(caught) == 1


def test_eval_in_embed_keeps_super_batches_out_of_running_statistics_and_training_in_train_mode(make_loop):
    model = Normed()
    for _ in make_loop(super_batches(2), embed=model, model=model, eval_in_embed=True):
        assert model.training
        assert model.norm.training
    assert model.norm.num_batches_tracked == 0
