"""The whole embedded stack for tests, on a tiny reference model: real Valkey, real Triton, real processes."""

from __future__ import annotations

import pytest
import torch

from jest_server.local.stack import Stack
from support import tiny_reference
from support.references import export_linear_reference

WIDTH = 16
VOCABULARY = 1000


def make_towers():
    """Makes the towers with weights that are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(42)
        return (
            tiny_reference.ImageTower(width=WIDTH).eval(),
            tiny_reference.TextTower(width=WIDTH, vocabulary=VOCABULARY).eval(),
        )


@pytest.fixture(scope="session")
def stack_repository(tmp_path_factory):
    """Folder of a servable model repository."""
    image, text = make_towers()
    folder = tmp_path_factory.mktemp("reference") / "repository"
    export_linear_reference(folder, image, text, scale=12.0, bias=-6.0)
    return folder


@pytest.fixture(scope="session")
def stack(stack_repository):
    """A running stack; tests may kill and pause its parts, it starts them again."""
    events = []
    with Stack(stack_repository, on_event=events.append) as stack:
        yield stack
    assert stack.failure is None, events


@pytest.fixture
def reference_towers():
    """Embeds a batch with the stack's reference model, apart from the stack."""
    image_tower, text_tower = make_towers()

    def embed(batch):
        with torch.inference_mode():
            return image_tower(batch["image"]), text_tower(batch["tokens"])

    return embed
