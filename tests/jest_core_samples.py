"""Random super-batches for the tests of jest_core, and their float64 copies for the oracle."""

import numpy as np
import torch
from hypothesis import strategies as st

import jest_core_oracle as oracle
from jest_core import Embeddings, ExampleLosses, PairLosses


def random_embeddings(
    size: int,
    *,
    seed: int,
    width: int = 16,
    scale: float = 8.0,
    bias: float = -4.0,
    dtype: torch.dtype = torch.float32,
) -> Embeddings:
    """Normalised rows; text leans towards its image, as in a model that has learnt something."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, width, generator=generator)
    text = 0.5 * image + torch.randn(size, width, generator=generator)
    unit = torch.nn.functional.normalize
    return Embeddings(unit(image, dim=1).to(dtype), unit(text, dim=1).to(dtype), scale, bias)


@st.composite
def any_embeddings(draw: st.DrawFn, size: int) -> Embeddings:
    """Of any width, scale, bias and element type."""
    return random_embeddings(
        size,
        seed=draw(st.integers(0, 2**32)),
        width=draw(st.integers(1, 24)),
        scale=draw(st.floats(0.1, 100)),
        bias=draw(st.floats(-20, 20)),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    )


def random_pair_losses(size: int, *, seed: int, dtype: torch.dtype = torch.float32) -> PairLosses:
    """A matrix that is not symmetric, and whose diagonal looks like the rest."""
    values = torch.rand(size, size, generator=torch.Generator().manual_seed(seed))
    return PairLosses((4 * values).to(dtype))


def random_example_losses(size: int, *, seed: int, dtype: torch.dtype = torch.float32) -> ExampleLosses:
    values = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return ExampleLosses((4 * values).to(dtype))


def exact(embeddings: Embeddings) -> oracle.Model:
    image, text = embeddings.image.double().numpy(), embeddings.text.double().numpy()
    return image, text, embeddings.scale, embeddings.bias


def exact_losses(losses: PairLosses | ExampleLosses) -> np.ndarray:
    return losses.values.double().numpy()


def random_pair(size: int, seed: int) -> tuple[Embeddings, Embeddings]:
    """A learner and a reference that differ in all that they may differ in."""
    learner = random_embeddings(size, seed=seed, width=12, scale=9.0, bias=-3.0, dtype=torch.bfloat16)
    reference = random_embeddings(size, seed=seed + 1, width=20, scale=14.0, bias=-5.0)
    return learner, reference
