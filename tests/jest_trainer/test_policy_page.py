"""The page for users on policies: what it says of fields is complete, and its snippets run as they stand."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import jest_core

PAGE = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHARED, *SECTIONS = SECTION.split(PAGE)
SNIPPETS = dict(zip(SECTIONS[::2], (SNIPPET.findall(text) for text in SECTIONS[1::2]), strict=True))
ROWS, SUPER_BATCHES = 80, 2


class Model(nn.Module):
    """Two linear towers."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.image, self.words = nn.Linear(12, 4), nn.Embedding(100, 4)
        self.scale, self.bias = 10.0, -5.0

    def forward(self, batch):
        image = functional.normalize(self.image(batch["image"].flatten(1) / 255), dim=1)
        return image, functional.normalize(self.words(batch["tokens"]).mean(1), dim=1)


def super_batch(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "keys": [f"{step}-{row}" for row in range(ROWS)],
        "image": torch.randint(0, 256, (ROWS, 3, 2, 2), generator=generator, dtype=torch.uint8),
        "tokens": torch.randint(0, 100, (ROWS, 4), generator=generator, dtype=torch.int32),
        "label": torch.randint(0, 3, (ROWS,), generator=generator),
        "reference_loss": torch.rand(ROWS, generator=generator),
        "concept": [None if row % 5 == 0 else f"concept {row % 7}" for row in range(ROWS)],
    }


@pytest.fixture
def names(client):
    """What the page presumes, and how many rows each call of `train` was given."""
    trained = []
    tower = nn.Linear(12, 3)
    known = {
        "client": client,
        "model": Model(),
        "classifier": lambda image: tower(image.flatten(1) / 255),
        "super_batches": [super_batch(step) for step in range(SUPER_BATCHES)],
        "train": lambda batch: trained.append(len(batch["keys"])),
        "trained": trained,
    }
    for snippet in SNIPPET.findall(SHARED):
        exec(snippet, known)
    return known


def run(section, names):
    (snippet,) = SNIPPETS[section]
    exec(compile(snippet, section, "exec"), names)


@pytest.mark.parametrize(
    "section",
    ["Sigmoid loss (SigLIP)", "Softmax loss (CLIP)", "Any other loss of pairs", "Losses of single examples"],
)
def test_the_loop_of_each_loss_trains_on_a_fifth(names, section):
    run(section, names)
    assert names["trained"] == [16] * SUPER_BATCHES


def test_the_schedules_have_the_values_that_the_page_says(names):
    run("Schedules", names)
    assert names["policy"].is_scheduled


def test_the_capped_loop_sends_its_labels(server, names):
    run("Caps on groups", names)
    assert names["trained"] == [16] * SUPER_BATCHES
    first = server.requests("SubmitSuperBatch")[0]
    assert list(first.group_labels) == [label or "" for label in super_batch(0)["concept"]]


def test_the_weighted_loop_has_gradients(names):
    run("Weights", names)
    assert names["model"].image.weight.grad.abs().sum() > 0
    assert len(names["decision"].weights) == 16


def test_the_distilled_loop_pulls_the_logits_towards_the_teacher_s(server, names):
    run("Weights", names)  # for its loss_of_rows, as a reader of the page has seen it
    run("Distillation", names)
    image, text = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    teacher = names["decision"].reference_embeddings
    same = type(teacher)(image.detach(), text.detach())
    names["distillation"](image, text, same, names["model"].scale).backward()
    assert image.grad.abs().max() < 1e-5  # who matches as the teacher does has nothing to learn from it
    names["distillation"](image, text, type(teacher)(-image.detach(), text.detach()), 1.0).backward()
    assert image.grad.abs().max() > 1e-3


def test_the_page_runs_whole_from_top_to_bottom(names):
    for section in SNIPPETS:
        run(section, names)


def test_no_snippet_is_left_out():
    assert sum(map(len, SNIPPETS.values())) + 1 == PAGE.count("```python")
    assert all(len(snippets) == 1 for snippets in SNIPPETS.values())


def test_the_table_has_every_field_with_its_default():
    cells = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", PAGE, re.MULTILINE)
    fields = {field.name: field.default for field in dataclasses.fields(jest_core.SelectionPolicy)}
    assert {name for name, _ in cells} == set(fields)
    for name, said in cells:
        if name not in {"filter_ratio", "sub_batch_size"}:
            assert said.strip().strip("`") == str(fields[name]), name


def test_the_table_names_every_choice():
    for choices in ("Scoring", "Loss", "Normalization", "Sampler", "Placement", "Precision"):
        for choice in getattr(jest_core.policy, choices).__args__:
            assert f"`{choice}`" in PAGE, choice
