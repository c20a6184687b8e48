import pytest
import torch

from jest_core import Embeddings, ExampleLosses
from jest_server.domain.errors import Conflict, QueueFull
from jest_server.selector.learner_outputs.pending import Assemblies, Assembly, LearnerOutputs, LossesOfModels


def outputs(digest="d", *, width=4, scale=10.0, dtype=torch.float32, rows=3):
    return LearnerOutputs(
        Embeddings(torch.ones(rows, width, dtype=dtype), torch.ones(rows, width, dtype=dtype), scale), digest
    )


async def test_an_assembly_is_complete_when_every_rank_has_come():
    assembly = Assembly("j", "sb", 2)
    assembly.add(1, outputs())
    assert assembly.missing_ranks() == [0]
    assert not assembly.complete.is_set()
    assembly.add(0, outputs())
    assert assembly.complete.is_set()


async def test_a_rank_may_repeat_itself_but_not_change_its_mind():
    assembly = Assembly("j", "sb", 2)
    assembly.add(0, outputs("a"))
    assembly.add(0, outputs("a"))
    with pytest.raises(Conflict, match="rank 0 sent other learner outputs"):
        assembly.add(0, outputs("b"))


@pytest.mark.parametrize(
    ("other", "says"),
    [({"width": 5}, "'width': 5"), ({"scale": 11.0}, "'scale': 11.0"), ({"dtype": torch.float16}, "float16")],
)
async def test_ranks_whose_learners_differ_are_refused(other, says):
    assembly = Assembly("j", "sb", 2)
    assembly.add(0, outputs())
    with pytest.raises(Conflict, match="learners differ") as caught:
        assembly.add(1, outputs(**other))
    assert says in str(caught.value)
    assert assembly.missing_ranks() == [1]


async def test_only_the_first_to_join_starts_the_work():
    assemblies, started = Assemblies(max_held_bytes=1000), []
    first = assemblies.join("j", "sb", 1, started.append)
    assert assemblies.join("j", "sb", 1, started.append) is first
    assert started == [first]
    assemblies.drop(first)
    assert len(assemblies) == 0


async def test_what_would_not_fit_is_told_to_come_back_before_it_is_received():
    assemblies = Assemblies(max_held_bytes=200)
    assembly = assemblies.join("j", "sb", 2, lambda _: None)
    assembly.add(0, outputs())
    assert assemblies.held_bytes == 96
    with assemblies.receiving(104, {}):
        assert assemblies.held_bytes == 200
    with pytest.raises(QueueFull, match="exceed the limit of 200") as caught, assemblies.receiving(105, {"job": "j"}):
        pytest.fail("it was let in")
    assert caught.value.retry_after_s > 0


async def test_what_is_being_received_counts_as_held_until_it_ends_or_fails():
    assemblies = Assemblies(max_held_bytes=200)
    with assemblies.receiving(150, {}), pytest.raises(QueueFull), assemblies.receiving(100, {}):
        pytest.fail("it was let in")
    assert assemblies.held_bytes == 0
    with pytest.raises(RuntimeError), assemblies.receiving(150, {}):
        raise RuntimeError
    assert assemblies.held_bytes == 0


async def test_one_selection_larger_than_the_limit_still_goes_through_alone():
    assemblies = Assemblies(max_held_bytes=10)
    with assemblies.receiving(1000, {}):
        assert assemblies.held_bytes == 1000


async def test_a_pair_loss_matrix_counts_once_for_all_ranks_and_as_long_as_it_is_held(tmp_path):
    assemblies = Assemblies(max_held_bytes=500, scratch_dir=tmp_path)
    assembly = assemblies.join("j", "sb", 2, lambda _: None)
    for rank in range(2):
        matrix = await assemblies.hold_matrix("j", "sb", 8, "FP32")
        assembly.add(rank, LearnerOutputs(matrix, str(rank)))
        assert assemblies.held_bytes == 256
    with pytest.raises(QueueFull, match="256 bytes are held"):
        await assemblies.hold_matrix("j", "another", 8, "FP32")
    assemblies.drop(assembly)
    assert assemblies.held_bytes == 0


async def test_ranks_that_bring_losses_of_other_datatypes_are_refused():
    def losses(dtype):
        return LearnerOutputs(LossesOfModels(ExampleLosses(torch.ones(3, dtype=dtype)), None), "d")

    assembly = Assembly("j", "sb", 2)
    assembly.add(0, losses(torch.float32))
    with pytest.raises(Conflict, match="float16"):
        assembly.add(1, losses(torch.float16))
