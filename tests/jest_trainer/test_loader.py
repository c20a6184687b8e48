from __future__ import annotations

import gc
import logging
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from trainer_samples import EXPECTED_ROWS, POLICY, embeddings, super_batch

import jest_trainer as jest
from jest_proto.v1 import jobs_pb2


def super_batches(count, first=0):
    return (super_batch(step) for step in range(first, first + count))


def ids(server, method="SubmitSuperBatch"):
    return [request.super_batch_id for request in server.requests(method)]


# What comes out


def test_every_super_batch_comes_out_reduced_to_the_chosen_rows_in_order_of_choice(make_loop):
    batches = list(make_loop(super_batches(3)))
    assert [batch["step"] for batch in batches] == [0, 1, 2]
    for step, batch in enumerate(batches):
        assert batch["keys"] == [f"{step}-{row}" for row in EXPECTED_ROWS]
        assert batch["row"].tolist() == EXPECTED_ROWS
        assert batch["image"].shape == (2, 3, 2, 2)
        assert batch["image"][:, 0, 0, 0].tolist() == [10 * step + row for row in EXPECTED_ROWS]


def test_an_empty_iterable_ends_the_loop_at_once(server, make_loop):
    assert list(make_loop([])) == []
    assert server.seen[1:] == []


def test_a_take_of_one_s_own_replaces_the_usual_one(make_loop):
    taken = list(make_loop(super_batches(1), take=lambda batch, positions: (batch["step"], positions)))
    assert taken[0][0] == 0
    assert taken[0][1].dtype == torch.int64
    assert taken[0][1].tolist() == EXPECTED_ROWS


def test_keys_may_be_integers_in_a_tensor(server, make_loop):
    list(make_loop(super_batches(1), keys=lambda batch: batch["row"] + 100))
    assert list(server.requests("SubmitSuperBatch")[0].example_keys) == [str(key) for key in range(100, 108)]


@pytest.mark.parametrize("keys", [np.arange(8), range(8), tuple("abcdefgh")])
def test_keys_may_be_any_sequence_of_strings_or_integers(server, make_loop, keys):
    list(make_loop(super_batches(1), keys=lambda _batch: keys))
    assert list(server.requests("SubmitSuperBatch")[0].example_keys) == [str(key) for key in keys]


# What is sent


def test_features_of_missing_rows_alone_are_uploaded(server, make_loop):
    server.cached = {f"0-{row}" for row in range(8)} - {"0-2", "0-3", "0-6"}
    list(make_loop(super_batches(1)))
    (header,) = server.requests("UploadExamples")
    assert list(header.positions) == [2, 3, 6]
    batch = super_batch(0)
    assert server.features == {
        f"0-{row}": {"image": batch["image"][row].numpy().tobytes(), "tokens": batch["tokens"][row].numpy().tobytes()}
        for row in (2, 3, 6)
    }


def test_features_are_not_even_asked_for_when_all_rows_are_cached(server, make_loop):
    server.cached = {f"0-{row}" for row in range(8)}
    list(make_loop(super_batches(1), features=lambda _batch: pytest.fail("asked for")))
    assert server.count("UploadExamples") == 0


@pytest.mark.parametrize(("wire_dtype", "name"), [("as_is", "FP32"), ("fp16", "FP16"), ("bf16", "BF16")])
def test_embeddings_travel_in_the_wire_type(server, make_loop, wire_dtype, name):
    list(make_loop(super_batches(1), wire_dtype=wire_dtype))
    (header,) = server.requests("SelectSubBatch")
    assert {spec.datatype for spec in header.tensors} == {name}
    assert (header.embeddings.scale, header.embeddings.bias) == (10.0, -1.0)


def test_the_learner_embeds_in_the_loop_s_thread_without_gradients_after_the_step_before(make_loop):
    events = []

    def note(what, batch):
        events.append((what, batch["step"], threading.current_thread(), torch.is_grad_enabled()))

    def embed(batch):
        note("embed", batch)
        return embeddings(batch)

    for batch in make_loop(super_batches(2), embed=embed):
        note("train", batch)
    here = threading.current_thread()
    assert events == [
        ("embed", 0, here, False),
        ("train", 0, here, True),
        ("embed", 1, here, False),
        ("train", 1, here, True),
    ]


# Running ahead


@pytest.mark.parametrize("prefetch", [1, 3])
def test_while_a_batch_is_trained_on_the_next_ones_are_submitted_and_uploaded(server, make_loop, until, prefetch):
    loop = iter(make_loop(super_batches(9), prefetch=prefetch))
    for step in range(3):
        next(loop)
        until(lambda step=step: server.count("UploadExamples") == step + 1 + prefetch)
        assert server.count("SubmitSuperBatch") == step + 1 + prefetch
        assert ids(server, "SelectSubBatch") == [f"{s:08d}" for s in range(step + 1)]
    loop.close()


def test_a_super_batch_is_submitted_and_uploaded_before_it_is_selected(server, make_loop):
    list(make_loop(super_batches(4)))
    for step in range(4):
        calls = [c.method for c in server.seen if getattr(c.request, "super_batch_id", "") == f"{step:08d}"]
        assert calls == ["SubmitSuperBatch", "UploadExamples", "SelectSubBatch"]


def test_while_its_sub_batch_is_trained_on_a_super_batch_is_let_go(make_loop, until):
    class Batch(dict):
        """A dictionary that can be watched."""

    watched = []

    def made():
        for step in range(4):
            batch = Batch(super_batch(step))
            watched.append(weakref.ref(batch))
            yield batch

    loop = iter(make_loop(made(), take=lambda batch, _positions: dict(batch), prefetch=1))
    next(loop)
    until(lambda: len(watched) == 2)
    until(lambda: gc.collect() is not None and watched[0]() is None)
    loop.close()


# Names of super-batches


def test_steps_count_on_from_pass_to_pass(server, make_loop):
    loop = make_loop([super_batch(0), super_batch(1)])
    list(loop)
    list(loop)
    assert ids(server) == ["00000000", "00000001", "00000002", "00000003"]


def test_a_prefix_stands_before_the_step(server, make_loop):
    list(make_loop(super_batches(1), prefix="epoch3-"))
    assert ids(server) == ["epoch3-00000000"]


def test_after_a_pass_that_was_left_early_no_submitted_name_is_used_again(server, make_loop):
    prefetch = 2
    steps = iter(range(100))
    loop = make_loop([super_batch(next(steps)) for _ in range(5)], prefetch=prefetch)
    for _ in loop:
        break
    for _ in loop:
        break
    # The server may see a submission that was cancelled late: tell the passes apart by name, not by order.
    names = sorted(set(ids(server)))
    first_of_second = f"{1 + prefetch + 1:08d}"
    assert first_of_second in names
    assert len([name for name in names if name < first_of_second]) <= 1 + prefetch
    assert names[-1] <= f"{1 + prefetch + 1 + prefetch:08d}"


def test_the_state_is_the_step_after_the_batch_that_came_out_last(make_loop):
    loop = make_loop(super_batches(3))
    states = [loop.state_dict()]
    states += [loop.state_dict() for _ in loop]
    assert states == [{"next_step": step} for step in (0, 1, 2, 3)]


def test_a_resumed_loop_goes_on_with_the_first_super_batch_that_was_not_trained_on(server, make_loop):
    loop = make_loop(super_batches(6))
    seen = []
    for batch in loop:
        seen.append(batch["keys"])
        if len(seen) == 3:
            break
    state = loop.state_dict()

    resumed = make_loop(super_batches(3, first=3))
    resumed.load_state_dict(state)
    seen += [batch["keys"] for batch in resumed]
    assert seen == [[f"{step}-{row}" for row in EXPECTED_ROWS] for step in range(6)]
    assert ids(server, "SelectSubBatch") == [f"{step:08d}" for step in range(6)]


@pytest.mark.parametrize("state", [{}, {"next_step": -1}, {"next_step": "3"}, {"next_step": True}])
def test_a_state_that_is_none_is_refused(make_loop, state):
    with pytest.raises(ValueError, match="next_step"):
        make_loop([]).load_state_dict(state)


def test_a_running_loop_does_not_take_a_state(make_loop):
    loop = make_loop(super_batches(3))
    running = iter(loop)
    next(running)
    with pytest.raises(RuntimeError, match="before the loop starts"):
        loop.load_state_dict({"next_step": 0})
    running.close()
    loop.load_state_dict({"next_step": 0})


def test_a_name_that_was_used_with_other_rows_is_an_error_with_advice(make_loop):
    list(make_loop(super_batches(1)))
    with pytest.raises(jest.JestError, match="SUPER_BATCH_CONFLICT") as caught:
        list(make_loop(super_batches(1, first=7)))
    assert "a prefix that was not used before" in caught.value.__notes__[0]


# Accounts


def test_stats_count_what_was_loaded_trained_cached_and_embedded(make_loop):
    loop = make_loop(super_batches(3))
    list(loop)
    stats = loop.stats
    assert (stats.super_batches, stats.examples_loaded, stats.examples_trained) == (3, 24, 6)
    assert (stats.cache_hits, stats.reference_inferences) == (3, 6)
    assert (stats.fallbacks, stats.dead_lettered, stats.perplexity) == (0, 0, 3.0)
    assert stats.embed_seconds > 0
    assert stats.select_seconds > 0
    assert stats.submit_wait_seconds > 0


def test_stats_are_a_copy(make_loop):
    loop = make_loop(super_batches(1))
    before = loop.stats
    list(loop)
    assert (before.super_batches, loop.stats.super_batches) == (0, 1)


def test_a_fallback_is_counted_and_never_silent(server, make_loop, caplog):
    server.answers = {"fallback": jobs_pb2.FALLBACK_UNIFORM, "fallback_reason": "3 shards were late"}
    loop = make_loop(super_batches(2))
    assert [decision.fallback for _, decision in loop.with_decisions()] == ["uniform", "uniform"]
    assert loop.stats.fallbacks == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        f"super-batch {step:08d} of job run-1 was chosen by the fallback uniform: 3 shards were late" for step in (0, 1)
    ]


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefetch": 0}, r"prefetch \(0\) must be at least 1"),
        ({"prefix": "a/b"}, r"prefix \('a/b'\)"),
        ({"prefix": "x" * 65}, "at most 64 characters"),
        ({"wire_dtype": "fp8"}, r"wire_dtype \('fp8'\) must be one of as_is, fp16, bf16"),
        ({"rank": 1}, r"rank \(1\) must lie in \[0, 1\)"),
    ],
)
def test_what_a_loop_cannot_be_made_of_is_named(make_loop, changes, message):
    with pytest.raises(ValueError, match=message):
        make_loop([], **changes)


def test_a_fallback_that_would_never_get_its_turn_is_refused(server, make_loop):
    with jest.Client(server.address, deadline_s=20) as patient, jest.Client(server.address, deadline_s=5) as hasty:
        patient.create_job("run", reference_model="r", policy=POLICY, fallback="uniform", reference_timeout_s=10)
        make_loop([], job=patient.get_job("run"))
        with pytest.raises(
            ValueError, match=r"deadline_s \(5\) must be larger than the job's reference_timeout_s \(10\)"
        ):
            make_loop([], job=hasty.get_job("run"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("abcdefgh", "not be a single string"),
        ([], "keys is empty"),
        ([1.5] * 8, r"keys\[0\] \(1.5\) must be a string or an integer, not float"),
        (["a", True], r"keys\[1\] \(True\)"),
        (torch.zeros(8), r"keys\[0\] \(0.0\)"),
        ([b"a"], r"keys\[0\] \(b'a'\) must be a string or an integer, not bytes"),
    ],
)
def test_keys_that_cannot_be_are_named(make_loop, keys, message):
    with pytest.raises(ValueError, match=message):
        list(make_loop(super_batches(1), keys=lambda _batch: keys))


def test_features_that_do_not_fit_the_keys_are_named(make_loop):
    with pytest.raises(ValueError, match=r"features\['image'\] has shape \[7, 3, 2, 2\], expected 8 rows"):
        list(make_loop(super_batches(1), features=lambda batch: {"image": batch["image"][:7]}))


def test_embeddings_that_do_not_fit_the_keys_are_named(make_loop):
    with pytest.raises(ValueError, match="embed returned 7 rows for a super-batch with 8 keys"):
        list(make_loop(super_batches(1), embed=lambda batch: embeddings({"row": batch["row"][:7]})))


# What it tells of its steps


def test_each_step_but_the_first_is_told_to_the_server_with_the_next_call(server, make_loop):
    batches = make_loop(super_batches(3))
    for _ in batches:
        time.sleep(0.05)
    told = [request.last_step for request in server.requests("SelectSubBatch") if request.HasField("last_step")]
    assert len(told) == 2
    for step in told:
        assert step.train.ToNanoseconds() >= 0.04e9
        assert step.select.ToNanoseconds() > 0
        assert step.embed.ToNanoseconds() > 0
    waited = sum(step.select.ToNanoseconds() for step in told) / 1e9
    assert waited <= batches.stats.select_seconds


def test_what_lies_between_two_passes_is_no_step(server, make_loop):
    batches = make_loop(list(super_batches(1)))
    list(batches)
    list(batches)
    assert not any(request.HasField("last_step") for request in server.requests("SelectSubBatch"))
