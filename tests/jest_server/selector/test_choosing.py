import pytest
import torch
from torch.nn import functional

from jest_core import Embeddings, SelectionPolicy, select_sub_batch, selection_seed
from jest_server.model import JobSpec, PolicySpec, ReferenceInfo
from jest_server.selector.assembly import LearnerOutputs
from jest_server.selector.choosing import choose

CPU = torch.device("cpu")
REFERENCE = ReferenceInfo(
    name="ref", version="1", preprocessing_id="p", scale=20.0, bias=-4.0, embedding_width=12, inputs=()
)


def unit(*shape, seed):
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def job(**fields):
    policy = PolicySpec(sub_batch_size=8, num_chunks=2, **fields.pop("policy", {}))
    return JobSpec(name="j", reference_model="ref", policy=policy, seed=5, **fields)


def world(rows):
    """Learner outputs and keys of ranks with so many rows each, and the joined reference."""
    outputs = {
        rank: LearnerOutputs(Embeddings(unit(n, 6, seed=rank), unit(n, 6, seed=50 + rank), 10.0, -10.0), str(rank))
        for rank, n in enumerate(rows)
    }
    keys = {rank: [f"{rank}-{row}" for row in range(n)] for rank, n in enumerate(rows)}
    return outputs, keys, unit(sum(rows), 2, 12, seed=99).half()


def test_several_ranks_choose_what_one_process_with_all_rows_would():
    outputs, keys, joined = world([20, 24])
    chosen = choose(job(world_size=2), "sb", outputs, keys, (REFERENCE, joined), CPU)
    learner = Embeddings(
        torch.cat([outputs[r].embeddings.image for r in range(2)]),
        torch.cat([outputs[r].embeddings.text for r in range(2)]),
        scale=10.0,
        bias=-10.0,
    )
    expected = select_sub_batch(
        learner,
        Embeddings(joined[:, 0].contiguous(), joined[:, 1].contiguous(), scale=20.0, bias=-4.0),
        SelectionPolicy(sub_batch_size=8, num_chunks=2),
        seed=selection_seed(5, "sb"),
        rank_of_row=torch.tensor([0] * 20 + [1] * 24),
    )
    together = [p for p in expected.positions.tolist() if p < 20], [p for p in expected.positions.tolist() if p >= 20]
    assert chosen.positions == {0: tuple(together[0]), 1: tuple(p - 20 for p in together[1])}
    assert chosen.perplexity == expected.perplexity


def test_the_same_arguments_give_the_same_choice_and_another_super_batch_another():
    outputs, keys, joined = world([40])
    first = choose(job(), "sb", outputs, keys, (REFERENCE, joined), CPU)
    assert choose(job(), "sb", outputs, keys, (REFERENCE, joined), CPU) == first
    assert choose(job(), "sb-2", outputs, keys, (REFERENCE, joined), CPU).positions != first.positions


@pytest.mark.parametrize("fallback", ["uniform", "hard_learner"])
def test_without_the_reference_the_fallback_chooses(fallback):
    outputs, keys, _ = world([40])
    chosen = choose(job(fallback=fallback), "sb", outputs, keys, None, CPU)
    declared = choose(job(policy={"scoring": fallback}), "sb", outputs, keys, None, CPU)
    assert chosen == declared


def test_global_placement_may_give_ranks_unequal_shares_that_add_up():
    outputs, keys, joined = world([20, 24])
    chosen = choose(job(world_size=2, policy={"placement": "global"}), "sb", outputs, keys, (REFERENCE, joined), CPU)
    assert sum(map(len, chosen.positions.values())) == chosen.sub_batch_size == 8


def test_equal_keys_on_two_ranks_are_chosen_once():
    outputs, keys, joined = world([10, 10])
    keys[1] = keys[0]
    chosen = choose(job(world_size=2), "sb", outputs, keys, (REFERENCE, joined), CPU)
    names = [keys[rank][p] for rank, positions in chosen.positions.items() for p in positions]
    assert len(names) == len(set(names)) == 8


def test_too_few_distinct_keys_cannot_be_chosen_from():
    outputs, _, joined = world([10])
    with pytest.raises(ValueError, match="8"):
        choose(job(), "sb", outputs, {0: ["same"] * 10}, (REFERENCE, joined), CPU)
