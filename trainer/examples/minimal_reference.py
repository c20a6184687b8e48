"""Train the reference model of `minimal.py` on right captions alone, and write the model repository that serves it."""

import argparse
from pathlib import Path

import minimal
import torch

from jest_server.domain.references import ReferenceInput
from jest_server.reference.export import ReferenceExport, Tower, export_reference


def main() -> None:
    """Train and export; takes about ten seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-repository", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    model = minimal.Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in minimal.super_batches(arguments.steps, 64, wrong=0.0, seed=1):
        loss = minimal.siglip_loss(*model(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    image = ReferenceInput(name="image", datatype="FP32", shape=(3, 32, 32))
    tokens = ReferenceInput(name="tokens", datatype="INT32", shape=(4,))
    export_reference(
        ReferenceExport(
            image=Tower("minimal:image_tower", model.image.state_dict(), (image,)),
            text=Tower("minimal:text_tower", model.text.state_dict(), (tokens,)),
            architecture=Path(minimal.__file__),
            scale=model.log_scale.exp().item(),
            bias=model.bias.item(),
            embedding_width=64,
            preprocessing_id="shapes-v1",
        ),
        arguments.model_repository,
    )
    print(f"{arguments.model_repository} holds the reference model; its loss was {loss:.2f}")


if __name__ == "__main__":
    main()
