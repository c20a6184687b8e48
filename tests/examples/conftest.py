import sys
from pathlib import Path

import pytest
import torch

# The example's modules import one another by name, as they do when it is run as a script.
sys.path.append(str(Path(__file__).parents[2] / "trainer" / "examples" / "emoji"))

from data import prepare
from experiment import Plan
from training import Settings


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("emoji")


@pytest.fixture(scope="session")
def prepared(cache_dir):
    return prepare(cache_dir, seed=7, curated_pairs=500)


@pytest.fixture(scope="session")
def tiny_plan():
    settings = Settings(steps=4, learning_rate=1e-3, batch_size=32, warmup_steps=1, evaluate_every=2)
    return Plan(curated_pairs=500, super_batch_size=160, reference=settings, uniform=settings, jest=settings)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
