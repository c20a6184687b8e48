"""Makes a reference model to measure with: `python benchmarks/stand_in/export.py FOLDER`.

Its weights are random, because what it costs does not depend on them. It is small on purpose: the less a model takes,
the more of the time is the scorer's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import towers

from jest_server.domain.references import ReferenceInput
from jest_server.reference.export import ReferenceExport, Tower, export_reference

SIDE, WORDS, OUT = 64, 16, 256
IMAGE = {"side": SIDE, "patch": 8, "width": 128, "depth": 2, "out": OUT}
TEXT = {"vocabulary": 1000, "width": 128, "depth": 1, "out": OUT}


def main(folder: Path) -> None:
    """Writes the model repository, unless it is there."""
    if folder.exists():
        return
    torch.manual_seed(0)
    image = ReferenceInput(name="image", datatype="UINT8", shape=(3, SIDE, SIDE))
    tokens = ReferenceInput(name="tokens", datatype="INT32", shape=(WORDS,))
    export = ReferenceExport(
        image=Tower("towers:ImageTower", towers.ImageTower(**IMAGE).state_dict(), (image,), IMAGE),
        text=Tower("towers:TextTower", towers.TextTower(**TEXT).state_dict(), (tokens,), TEXT),
        architecture=Path(towers.__file__),
        scale=10.0,
        bias=-10.0,
        embedding_width=OUT,
        preprocessing_id="stand-in",
    )
    export_reference(export, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
