"""Which decision belongs to a batch, however far its reader is ahead."""

from __future__ import annotations

import weakref
from collections import UserDict, deque

import pytest
import torch
from trainer_samples import EXPECTED_ROWS, super_batch

import jest_trainer as jest

STEPS = 6


def embed(batch):
    """Makes the rows after the batch's step the best, so that each step has its own decision."""
    first = ((batch["row"] - batch["step"]) % 8) / 8
    image = torch.stack([first, (1 - first**2).sqrt()], dim=1)
    return jest.Embeddings(image, image, scale=10.0, bias=-1.0)


def ahead(batches, count):
    """Reads `count` batches more than it has given, as trainers do."""
    read = deque()
    for batch in batches:
        read.append(batch)
        if len(read) > count:
            yield read.popleft()
    yield from read


def require_own(batches_with_decisions):
    """Compares each batch, which says its step and rows itself, with its decision."""
    steps = []
    for batch, decision in batches_with_decisions:
        assert decision.super_batch_id == f"{batch['step']:08d}"
        assert decision.positions.tolist() == batch["row"].tolist()
        steps.append(batch["step"])
    assert steps == list(range(STEPS))


@pytest.fixture
def loop(make_loop):
    return make_loop([super_batch(step) for step in range(STEPS)], embed=embed)


@pytest.mark.parametrize("count", [0, 1, STEPS])
def test_a_batch_comes_with_its_own_decision_however_far_its_reader_is_ahead(loop, count):
    require_own(ahead(loop.with_decisions(), count))


@pytest.mark.parametrize("count", [0, 1, STEPS])
def test_a_decision_under_a_key_stays_with_its_batch(make_loop, count):
    loop = make_loop([super_batch(step) for step in range(STEPS)], embed=embed, decision_key="jest")
    require_own((batch, batch["jest"]) for batch in ahead(loop, count))


def test_a_pass_with_decisions_is_a_pass_like_any_other(loop, make_loop):
    (batch, decision), *_ = loop.with_decisions()
    assert (batch["step"], decision.super_batch_id) == (0, "00000000")
    assert loop.state_dict() == {"next_step": STEPS}
    with make_loop([super_batch(0), super_batch(1)], prefix="left-") as left:
        for _ in left.with_decisions():
            break
        assert left.state_dict() == {"next_step": 1}


@pytest.mark.parametrize("with_decisions", [False, True])
def test_a_sub_batch_that_its_reader_no_longer_holds_is_freed_before_the_next_forward_pass(make_loop, with_decisions):
    given, freed = [], []

    def watching(batch):
        freed.append([reference() is None for reference in given])
        return embed(batch)

    loop = make_loop([UserDict(super_batch(step)) for step in range(3)], embed=watching)
    for item in loop.with_decisions() if with_decisions else loop:
        given.append(weakref.ref(item[0] if with_decisions else item))
        del item
    assert freed == [[], [True], [True, True]]


def test_reference_embeddings_come_with_the_decision(make_loop):
    loop = make_loop([super_batch(0)], return_reference_embeddings=True)
    ((_, decision),) = loop.with_decisions()
    assert decision.reference_embeddings.image[:, 0].tolist() == EXPECTED_ROWS


def test_a_batch_of_another_mapping_type_keeps_it(make_loop):
    (batch,) = make_loop([UserDict(super_batch(0))], decision_key="jest")
    assert type(batch) is UserDict
    assert batch["jest"].positions.tolist() == batch["row"].tolist()


def test_a_batch_that_take_returns_as_it_is_stays_without_the_decision(make_loop):
    own = super_batch(0)
    (batch,) = make_loop([own], decision_key="jest", take=lambda batch, _positions: batch)
    assert "jest" in batch
    assert "jest" not in own


def test_a_batch_that_take_makes_a_dictionary_can_hold_the_decision(make_loop):
    batches = [(super_batch(0), "more")]
    (batch,) = make_loop(
        batches,
        keys=lambda batch: batch[0]["keys"],
        features=lambda batch: {"image": batch[0]["image"], "tokens": batch[0]["tokens"]},
        embed=lambda batch: embed(batch[0]),
        take=lambda batch, positions: {"row": batch[0]["row"][positions]},
        decision_key="jest",
    )
    assert batch["jest"].positions.tolist() == batch["row"].tolist()


@pytest.mark.parametrize("key", ["", 3, True, ("jest",)])
def test_a_key_that_is_no_name_is_refused(make_loop, key):
    with pytest.raises(ValueError, match=r"decision_key \(.*\) must be a non-empty string or None"):
        make_loop([], decision_key=key)


def test_a_key_that_the_batch_has_is_refused_naming_the_batch_s_keys(make_loop):
    with pytest.raises(
        ValueError, match=r"decision_key \('row'\) is a key of the batch itself: \['image', 'keys', 'row'"
    ):
        list(make_loop([super_batch(0)], decision_key="row"))


def test_batches_that_are_no_dictionaries_are_refused_with_the_other_way(make_loop):
    with pytest.raises(
        ValueError, match=r"decision_key \('jest'\) needs batches that are .*, not tuple; with_decisions"
    ):
        list(make_loop([super_batch(0)], decision_key="jest", take=lambda batch, _positions: tuple(batch)))
