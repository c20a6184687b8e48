"""The whole embedded stack for tests, on a tiny reference model: real Valkey, real Triton, real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jest_server.embedded.up import Stack
from jest_server.model import ReferenceInput
from jest_server.reference.export import ReferenceExport, Tower, export_reference
from support import tiny_reference

TEMPLATE = Path(__file__).parents[2] / "deploy" / "triton" / "model_repository"
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
    export = ReferenceExport(
        image=Tower(
            "tiny_reference:ImageTower",
            image.state_dict(),
            (ReferenceInput(name="image", datatype="UINT8", shape=(3, 32, 32)),),
            {"width": WIDTH},
        ),
        text=Tower(
            "tiny_reference:TextTower",
            text.state_dict(),
            (ReferenceInput(name="tokens", datatype="INT32", shape=(-1,)),),
            {"width": WIDTH, "vocabulary": VOCABULARY},
        ),
        architecture=Path(tiny_reference.__file__),
        scale=12.0,
        bias=-6.0,
        embedding_width=WIDTH,
        preprocessing_id="tiny-v1",
    )
    export_reference(export, folder, template=TEMPLATE)
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
