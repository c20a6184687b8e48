import pytest
import torch

from jest_core import Embeddings, ExampleLosses
from jest_server.domain.errors import Conflict, QueueFull
from jest_server.domain.super_batches import SuperBatchRef
from jest_server.selector.learner_outputs.pending_selections import (
    LearnerOutputs,
    LossesOfModels,
    PendingSelection,
    PendingSelections,
)

REF = SuperBatchRef("j", "sb")


def outputs(digest="d", *, width=4, scale=10.0, dtype=torch.float32, rows=3):
    return LearnerOutputs(
        Embeddings(torch.ones(rows, width, dtype=dtype), torch.ones(rows, width, dtype=dtype), scale), digest
    )


async def test_a_pending_selection_is_complete_when_every_rank_has_come():
    pending = PendingSelection(REF, 2)
    pending.add(1, outputs())
    assert pending.missing_ranks() == [0]
    assert not pending.complete.is_set()
    pending.add(0, outputs())
    assert pending.complete.is_set()


async def test_a_ranks_later_outputs_replace_its_earlier_ones_until_the_selection_is_computed():
    pending = PendingSelection(REF, 2)
    pending.add(0, outputs("a"))
    pending.add(0, outputs("b"))
    assert pending.outputs[0].digest == "b"
    pending.add(1, outputs("c"))
    pending.add(0, outputs("d"))
    assert pending.outputs[0].digest == "d", "the reference embeddings may still be awaited"
    pending.stage = "COMPUTING"
    pending.add(0, outputs("e"))
    assert pending.outputs[0].digest == "d"


async def test_a_scale_that_differs_in_its_last_bits_is_no_other_learners():
    pending = PendingSelection(REF, 2)
    pending.add(0, outputs())
    pending.add(1, outputs(scale=10.0 * (1 + 1e-6)))
    assert not pending.missing_ranks()


@pytest.mark.parametrize(
    ("other", "says"),
    [({"width": 5}, "'width': 5"), ({"scale": 11.0}, "'scale': 11.0"), ({"dtype": torch.float16}, "float16")],
)
async def test_ranks_whose_learners_differ_are_refused(other, says):
    pending = PendingSelection(REF, 2)
    pending.add(0, outputs())
    with pytest.raises(Conflict, match="learners differ") as caught:
        pending.add(1, outputs(**other))
    assert says in str(caught.value)
    assert pending.missing_ranks() == [1]


async def test_only_the_first_to_join_starts_the_work():
    selections, started = PendingSelections(max_held_bytes=1000), []
    first = selections.join(REF, 1, started.append)
    assert selections.join(REF, 1, started.append) is first
    assert started == [first]
    selections.drop(first)
    assert len(selections) == 0


async def test_what_would_not_fit_is_told_to_come_back_before_it_is_received():
    selections = PendingSelections(max_held_bytes=200)
    pending = selections.join(REF, 2, lambda _: None)
    pending.add(0, outputs())
    assert selections.held_bytes == 96
    with selections.receiving(104, {}):
        assert selections.held_bytes == 200
    with pytest.raises(QueueFull, match="exceed the limit of 200") as caught, selections.receiving(105, {"job": "j"}):
        pytest.fail("it was let in")
    assert caught.value.retry_after_s > 0


async def test_what_is_being_received_counts_as_held_until_it_ends_or_fails():
    selections = PendingSelections(max_held_bytes=200)
    with selections.receiving(150, {}), pytest.raises(QueueFull), selections.receiving(100, {}):
        pytest.fail("it was let in")
    assert selections.held_bytes == 0
    with pytest.raises(RuntimeError), selections.receiving(150, {}):
        raise RuntimeError
    assert selections.held_bytes == 0


async def test_one_selection_larger_than_the_limit_still_goes_through_alone():
    selections = PendingSelections(max_held_bytes=10)
    with selections.receiving(1000, {}):
        assert selections.held_bytes == 1000


async def test_a_pair_loss_matrix_counts_once_for_all_ranks_and_as_long_as_it_is_held(tmp_path):
    selections = PendingSelections(max_held_bytes=500, scratch_dir=tmp_path)
    pending = selections.join(REF, 2, lambda _: None)
    for rank in range(2):
        matrix = await selections.acquire_matrix(REF, 8, "FP32")
        pending.add(rank, LearnerOutputs(matrix, str(rank)))
        assert selections.held_bytes == 256
    with pytest.raises(QueueFull, match="256 bytes are held"):
        await selections.acquire_matrix(SuperBatchRef("j", "another"), 8, "FP32")
    selections.drop(pending)
    assert selections.held_bytes == 0


async def test_ranks_that_bring_losses_of_other_datatypes_are_refused():
    def losses(dtype):
        return LearnerOutputs(LossesOfModels(ExampleLosses(torch.ones(3, dtype=dtype)), None), "d")

    pending = PendingSelection(REF, 2)
    pending.add(0, losses(torch.float32))
    with pytest.raises(Conflict, match="float16"):
        pending.add(1, losses(torch.float16))
