import json
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from jest_core import SelectionPolicy, select_sub_batch
from jest_core_samples import random_pair

POLICY = SelectionPolicy(filter_ratio=0.75, num_chunks=5)

IN_ANOTHER_PROCESS = """
import json, sys, torch
from jest_core import Embeddings, SelectionPolicy, select_sub_batch
models = torch.load(sys.argv[1], weights_only=True)
policy = SelectionPolicy.from_dict(json.loads(sys.argv[2]))
selection = select_sub_batch(*(Embeddings(*model) for model in models), policy, seed=int(sys.argv[3]))
sys.stdout.write(json.dumps(selection.positions.tolist()))
"""


@pytest.fixture
def thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_same_seed_gives_the_same_selection_in_another_process(tmp_path):
    pair = random_pair(500, seed=31)
    stored = tmp_path / "models.pt"
    torch.save([(model.image, model.text, model.scale, model.bias) for model in pair], stored)
    arguments = [str(stored), json.dumps(POLICY.to_dict()), str(2**63 + 5)]
    answer = subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, *arguments], capture_output=True, check=True)
    assert json.loads(answer.stdout) == select_sub_batch(*pair, POLICY, seed=2**63 + 5).positions.tolist()


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_number_of_threads_changes_nothing(thread_count, loss, precision):
    pair = random_pair(3000, seed=32)
    policy = SelectionPolicy(loss=loss, precision=precision, filter_ratio=0.75, num_chunks=5, weights=True)
    answers = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        answers.append(select_sub_batch(*pair, policy, seed=8))
    assert torch.equal(answers[0].positions, answers[1].positions)
    assert torch.equal(answers[0].positions, answers[2].positions)
    assert torch.equal(answers[0].weights, answers[2].weights)


def test_another_seed_gives_another_selection():
    pair = random_pair(200, seed=33)
    assert not torch.equal(
        select_sub_batch(*pair, POLICY, seed=1).positions, select_sub_batch(*pair, POLICY, seed=2).positions
    )


def test_global_random_state_is_neither_read_nor_changed():
    pair = random_pair(200, seed=34)
    torch.manual_seed(1)
    before, python_before = torch.random.get_rng_state(), random.getstate()
    first = select_sub_batch(*pair, POLICY, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert random.getstate() == python_before
    torch.manual_seed(2)
    assert torch.equal(select_sub_batch(*pair, POLICY, seed=1).positions, first.positions)


def test_inputs_are_left_as_they_were():
    learner, reference = random_pair(100, seed=35)
    copies = [model.clone() for model in (learner.image, learner.text, reference.image, reference.text)]
    select_sub_batch(learner, reference, POLICY, seed=1)
    originals = (learner.image, learner.text, reference.image, reference.text)
    assert all(torch.equal(a, b) for a, b in zip(originals, copies, strict=True))


def test_selection_runs_where_torch_is_told_to_be_deterministic():
    pair = random_pair(100, seed=36)
    expected = select_sub_batch(*pair, POLICY, seed=1)
    torch.use_deterministic_algorithms(True)
    try:
        selection = select_sub_batch(*pair, POLICY, seed=1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(selection.positions, expected.positions)
