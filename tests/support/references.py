"""A tiny reference model, exported as users export theirs, and examples for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from jest_server.domain.references import ReferenceInput
from jest_server.reference.export import ReferenceExport, Tower, export_reference
from support import slow_model, tiny_reference, tiny_towers

if TYPE_CHECKING:
    from jest_server.domain.references import ReferenceInfo

IMAGE = ReferenceInput(name="image", datatype="UINT8", shape=(3, tiny_towers.SIDE, tiny_towers.SIDE))
TOKENS = ReferenceInput(name="tokens", datatype="INT32", shape=(-1,))
TOKENS_LENGTH = 6


def tiny_export(*, seed: int = 0, width: int = tiny_towers.WIDTH) -> ReferenceExport:
    """Returns a reference model with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        image, text = tiny_towers.ImageTower(width=width), tiny_towers.TextTower(width=width)
    return ReferenceExport(
        image=Tower("tiny_towers:ImageTower", image.state_dict(), (IMAGE,), {"width": width}),
        text=Tower("tiny_towers:TextTower", text.state_dict(), (TOKENS,), {"width": width}),
        architecture=Path(tiny_towers.__file__),
        scale=10.0,
        bias=-10.0,
        embedding_width=width,
        preprocessing_id="tiny-v1",
    )


def export_tiny_reference(destination: Path, *, seed: int = 0) -> ReferenceInfo:
    """Makes a model repository that Triton and the in-process adapter can serve."""
    return export_reference(tiny_export(seed=seed), destination)


def export_linear_reference(
    destination: Path, image: tiny_reference.ImageTower, text: tiny_reference.TextTower, *, scale: float, bias: float
) -> None:
    """Makes a model repository of two linear towers on pictures of 32 by 32."""
    width = image.project.out_features
    pictures = IMAGE.model_copy(update={"shape": (3, 32, 32)})
    options = {"width": width, "vocabulary": text.embed.num_embeddings}
    export = ReferenceExport(
        image=Tower("tiny_reference:ImageTower", image.state_dict(), (pictures,), {"width": width}),
        text=Tower("tiny_reference:TextTower", text.state_dict(), (TOKENS,), options),
        architecture=Path(tiny_reference.__file__),
        scale=scale,
        bias=bias,
        embedding_width=width,
        preprocessing_id="linear-v1",
    )
    export_reference(export, destination)


def export_slow_model(repository: Path) -> None:
    """Makes a model repository with a reference model that is no ensemble, and whose queue holds one request."""
    folder = repository / slow_model.NAME / "1"
    folder.mkdir(parents=True)
    shutil.copy(slow_model.__file__, folder / "model.py")
    (folder.parent / "config.pbtxt").write_text(slow_model.CONFIG)


def tiny_examples(count: int, *, seed: int = 0, length: int = TOKENS_LENGTH) -> dict[str, np.ndarray]:
    """Returns random pictures and captions, by input name."""
    draw = np.random.default_rng(seed)
    return {
        IMAGE.name: draw.integers(0, 256, (count, *IMAGE.shape), dtype=np.uint8),
        TOKENS.name: draw.integers(0, tiny_towers.VOCABULARY, (count, length), dtype=np.int32),
    }


def put_in_mood(examples: dict[str, np.ndarray], row: int, mood: tiny_towers.Mood) -> dict[str, np.ndarray]:
    """Makes one picture ask for misbehaviour."""
    examples[IMAGE.name].reshape(len(examples[IMAGE.name]), -1)[row, :4] = (*tiny_towers.MAGIC, mood)
    return examples
