"""The page for users on loops in trainers: its snippets run as they stand, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from jest_trainer._loop.loader_shape import LoaderShape

PAGE = (Path(__file__).parents[2] / "docs" / "loop.md").read_text(encoding="utf-8")
SNIPPETS = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL).findall(PAGE)
ROWS = 160


class Model:
    scale, bias = 10.0, -5.0

    def __call__(self, batch):
        image = functional.normalize(batch["image"].flatten(1).float() + 1, dim=1)
        return image, image


@pytest.fixture
def names(client):
    """What the page presumes; the batches that `train` was given are in `trained`."""
    pixels = torch.randint(0, 256, (ROWS, 3, 2, 2), dtype=torch.uint8)
    tokens = torch.ones(4, dtype=torch.int32)
    trained = []
    return {
        "client": client,
        "model": Model(),
        "dataset": [{"index": i, "keys": f"k{i}", "image": pixels[i], "tokens": tokens} for i in range(ROWS)],
        "earlier_losses": torch.arange(ROWS) / ROWS,
        "train": trained.append,
        "trained": trained,
    }


def test_each_snippet_trains_on_a_fifth_of_what_it_selects_from(names, capsys):
    for snippet in SNIPPETS:
        exec(compile(snippet, "docs/loop.md", "exec"), names)
    assert [len(batch["keys"]) for batch in names["trained"]] == [16] * (2 + 2 + 4 + 2)
    assert all("jest" not in batch for batch in names["trained"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["00000000 None", "00000001 None"]
    assert printed[2:] == [f"epoch {epoch}: {step} of 2, 16 rows" for epoch in (0, 1) for step in (1, 2)]


def test_no_snippet_is_left_out():
    assert len(SNIPPETS) == PAGE.count("```python")


def test_the_table_has_every_name_that_a_loop_has_of_its_loader():
    table = " ".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| "))
    for name in (name for name in vars(LoaderShape) if not name.startswith("_")):
        assert f"`{name}" in table, name
