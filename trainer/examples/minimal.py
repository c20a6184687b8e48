"""A complete training run: a small SigLIP model learns to match drawn shapes with captions, half of which are wrong.

Make a reference model and serve it (needs `pip install '.[local]'` from a clone):

    python trainer/examples/minimal_reference.py --model-repository build/shapes
    jest-server up --model-repository build/shapes

and, in another terminal, run `python trainer/examples/minimal.py`.
"""

import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional

import jest_trainer as jest

SIZES, SHAPES = {"small": 4, "large": 8}, {"triangle": 3, "square": 4, "hexagon": 6, "circle": 30}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
PLACES = {"top": (16, 8), "left": (8, 16), "centre": (16, 16), "right": (24, 16), "bottom": (16, 24)}
CAPTIONS = list(itertools.product(SIZES, COLOURS, SHAPES, PLACES))
WORDS = [*SIZES, *COLOURS, *SHAPES, *PLACES]


def draw(size: str, colour: str, shape: str, place: str) -> Tensor:
    picture = Image.new("RGB", (32, 32), "white")
    ImageDraw.Draw(picture).regular_polygon((PLACES[place], SIZES[size]), SHAPES[shape], fill=colour)
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1) / 255


def super_batches(steps: int, rows: int, *, wrong: float, seed: int) -> Iterator[dict]:
    pictures = torch.stack([draw(*caption) for caption in CAPTIONS])
    tokens = torch.tensor([[WORDS.index(word) for word in caption] for caption in CAPTIONS], dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        shown, other = torch.randint(len(CAPTIONS), (2, rows), generator=generator)
        said = torch.where(torch.rand(rows, generator=generator) < wrong, other, shown)
        keys = [f"picture {one}, caption {another}" for one, another in zip(shown.tolist(), said.tolist(), strict=True)]
        yield {"keys": keys, "image": pictures[shown], "tokens": tokens[said], "right": shown == said}


class Tower(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        return functional.normalize(super().forward(inputs))


def image_tower() -> Tower:
    return Tower(nn.Conv2d(3, 64, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 64, 64))


def text_tower() -> Tower:
    return Tower(nn.EmbeddingBag(len(WORDS), 64))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = image_tower(), text_tower()
        self.log_scale, self.bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-5.0))

    def forward(self, batch: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.image(batch["image"]), self.text(batch["tokens"]), self.log_scale.exp(), self.bias


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(image)) - 1  # +1 for a picture and its own caption, -1 for any other caption
    return -functional.logsigmoid(signs * (scale * image @ text.T + bias)).sum() / len(image)


def main(address: str = "127.0.0.1:50051", steps: int = 200) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # README: from here
    client = jest.Client(address)  # "127.0.0.1:50051", as jest-server up prints it
    job = client.create_job(
        f"shapes-{time.time_ns()}",  # a job remembers its decisions: another run is another job
        reference_model="jest_reference",
        policy=jest.SelectionPolicy(filter_ratio=0.8, num_chunks=8),
    )
    selected = jest.SelectedBatches(
        job,
        super_batches(steps, 160, wrong=0.5, seed=0),
        keys=lambda batch: batch["keys"],
        features=lambda batch: {"image": batch["image"], "tokens": batch["tokens"]},  # for the reference model
        embed=lambda batch: jest.Embeddings(*model(batch)),  # what the learner makes of it, without gradients
    )
    for step, batch in enumerate(selected, start=1):
        loss = siglip_loss(*model(batch))  # an ordinary batch: the 32 pairs of 160 that were chosen
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.2f}, {batch['right'].float().mean():.0%} of the captions are right")
    # README: to here
    stats = selected.stats
    print(f"trained on {stats.examples_trained:,} of {stats.examples_loaded:,} pairs, of which half were wrong")
    print(f"the reference model embedded {stats.reference_inferences:,}, {stats.cache_hits:,} were cached")


if __name__ == "__main__":
    main()
