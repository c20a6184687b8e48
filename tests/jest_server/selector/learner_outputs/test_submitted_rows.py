import asyncio
import time

import pytest

from jest_proto.v1.selection_pb2 import SelectSubBatchHeader
from jest_server.domain.errors import SuperBatchUnknown, WaitTimeout
from jest_server.domain.super_batches import SuperBatchRef
from jest_server.selector.learner_outputs.request import ANSWER_MARGIN_S, SelectRequest
from jest_server.selector.learner_outputs.submitted_rows import SubmittedRows
from support.memory_stores.stores import open_memory_stores
from support.super_batches import spec, submit


@pytest.fixture
async def stores():
    stores = open_memory_stores()
    await stores.jobs.create_job(spec("job", world_size=2), now_s=time.time())
    return stores


@pytest.fixture
def rows(stores):
    return SubmittedRows(stores.super_batches, stores.decisions)


def call(rank=0, *, waits_s=10.0):
    deadline_s = time.monotonic() + waits_s
    return SelectRequest(SuperBatchRef("job", "sb"), rank, 2, SelectSubBatchHeader(), deadline_s)


async def submit_rank(stores, rank, keys):
    await submit(stores, "job", rank=rank, world_size=2, keys=keys)


async def test_a_rank_that_did_not_submit_is_told_to(stores, rows):
    await submit_rank(stores, 0, ("a", "b"))
    assert await rows.of_rank(call(0)) == 2
    with pytest.raises(SuperBatchUnknown, match="rank 1 did not submit super-batch 'sb' of job 'job'; submit it first"):
        await rows.of_rank(call(1))


async def test_all_ranks_are_counted_once_the_last_has_submitted(stores, rows):
    await submit_rank(stores, 0, ("a", "b"))
    waiting = asyncio.create_task(rows.of_all_ranks(call()))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await submit_rank(stores, 1, ("c", "d", "e"))
    assert await waiting == [2, 3]


async def test_a_deadline_names_the_ranks_that_are_missing(stores, rows):
    await submit_rank(stores, 0, ("a", "b"))
    with pytest.raises(WaitTimeout, match=r"ranks \[1\] have not submitted") as caught:
        await rows.of_all_ranks(call(waits_s=ANSWER_MARGIN_S + 0.05))
    assert caught.value.reason == "WAITING_FOR_RANKS"
    assert caught.value.metadata == {"job": "job", "super_batch_id": "sb", "rank": "0"}
