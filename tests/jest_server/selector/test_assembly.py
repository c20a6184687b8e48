import pytest
import torch

from jest_core import Embeddings
from jest_server.errors import Conflict, QueueFull
from jest_server.selector.assembly import Assemblies, Assembly, LearnerOutputs


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
    assemblies.reserve(104, {})
    with pytest.raises(QueueFull, match="exceed the limit of 200") as caught:
        assemblies.reserve(105, {"job": "j"})
    assert caught.value.retry_after_s > 0


async def test_one_selection_larger_than_the_limit_still_goes_through_alone():
    Assemblies(max_held_bytes=10).reserve(1000, {})
