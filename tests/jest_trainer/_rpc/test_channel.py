from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import threading
import time

import grpc
import numpy as np
import pytest
import torch
from scripted_server import ScriptedServer, fail, hold
from trainer_samples import POLICY

import jest_trainer as jest
from jest_proto.v1 import jobs_pb2, selection_pb2
from jest_trainer._rpc.deadlines import Cancellation, Cancelled
from support.polling import within

Code = grpc.StatusCode
KIB = 1 << 10


# Retries


@pytest.mark.parametrize("size", [255 * KIB, 257 * KIB, 8 << 20])
def test_an_upload_of_any_size_gets_through_when_the_server_fails_twice(server, job, size):
    job.submit("a", ["k"], step=0)
    server.script["UploadExamples"].extend([fail(Code.UNAVAILABLE)] * 2)
    pixels = np.random.default_rng(0).integers(0, 256, (1, size), np.uint8)
    assert job.upload("a", [0], {"image": pixels}) == 1
    assert server.count("UploadExamples") == 3
    assert server.features["k"]["image"] == pixels.tobytes()


@pytest.mark.parametrize(
    "failure",
    [
        fail(Code.UNAVAILABLE),
        fail(Code.UNAVAILABLE, "STOPPING", retry_after_s=0.01),
        fail(Code.DATA_LOSS, "CHECKSUM_MISMATCH", retry_after_s=0.0),
        fail(Code.DATA_LOSS),
        fail(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after_s=0.01),
        fail(Code.FAILED_PRECONDITION, "REFERENCE_UNAVAILABLE", retry_after_s=0.01),
    ],
)
def test_what_may_pass_is_tried_again(server, client, failure):
    server.script["GetServerInfo"].append(failure)
    assert client.server_info().version == "1.2.3"
    assert server.count("GetServerInfo") == 2


@pytest.mark.parametrize(
    "failure",
    [
        fail(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
        fail(Code.FAILED_PRECONDITION, "REFERENCE_MISSING"),
        fail(Code.DEADLINE_EXCEEDED, "WAITING_FOR_RANKS", retry_after_s=0.0),
        fail(Code.INVALID_ARGUMENT, "INVALID_FIELD"),
        fail(Code.ABORTED, "DEAD_LETTERED"),
        fail(Code.INTERNAL),
    ],
)
def test_what_will_not_pass_is_raised_at_once(server, client, failure):
    server.script["GetServerInfo"].append(failure)
    with pytest.raises(jest.JestError):
        client.server_info()
    assert server.count("GetServerInfo") == 1


def test_the_server_s_own_delay_is_kept(server, client):
    server.script["GetServerInfo"].append(fail(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after_s=0.7))
    client.server_info()
    first, second = (call.at for call in server.seen)
    assert 0.7 <= second - first < 1.5


def test_pauses_grow_when_the_server_has_no_wish(server, client):
    server.script["GetServerInfo"].extend([fail(Code.UNAVAILABLE)] * 4)
    client.server_info()
    at = [call.at for call in server.seen]
    gaps = [after - before for before, after in itertools.pairwise(at)]
    assert all(gap >= pause for gap, pause in zip(gaps, (0.1, 0.2, 0.4, 0.8), strict=True))


def test_a_delay_beyond_the_deadline_is_not_waited_for(server):
    server.script["CreateJob"].append(fail(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after_s=100))
    with jest.Client(server.address, deadline_s=3) as client, within(1.0), pytest.raises(jest.JestError) as caught:
        client.create_job("run", reference_model="r", policy=POLICY)
    assert caught.value.retry_after_s == 100


def test_retries_end_with_the_deadline_and_say_how_many_there_were(server):
    server.script["GetServerInfo"].extend([fail(Code.UNAVAILABLE)] * 100)
    with jest.Client(server.address, deadline_s=1) as client, within(2.0), pytest.raises(jest.JestError) as caught:
        client.server_info()
    count = server.count("GetServerInfo")
    assert count > 2
    assert caught.value.__notes__ == [f"{count} attempts were made within the deadline of 1 s."]


def test_only_the_first_failure_of_a_call_is_a_warning(server, client, caplog):
    caplog.set_level(logging.DEBUG, "jest_trainer")
    server.script["GetServerInfo"].extend([fail(Code.UNAVAILABLE)] * 2)
    client.server_info()
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG"]


def test_a_restarted_server_is_found_again_within_the_call():
    server = ScriptedServer()
    with jest.Client(server.address, deadline_s=20) as client:
        client.server_info()
        server.stop()
        answers = []
        caller = threading.Thread(target=lambda: answers.append(client.server_info()))
        caller.start()
        time.sleep(0.3)  # the call meets a closed port for a while
        again = ScriptedServer(server.port)
        with within(5.0):
            caller.join()
        assert answers
    again.stop()


def test_a_client_outlives_a_server_that_is_killed(process_server):
    process, address = process_server
    with jest.Client(address, deadline_s=10) as client:
        client.server_info()
        process.kill()
        process.wait()
        again = ScriptedServer(int(address.rpartition(":")[2]))
        assert client.server_info().version == "1.2.3"
    again.stop()


def test_a_call_in_flight_is_made_again_when_its_server_is_killed(process_server, until):
    process, address = process_server
    with jest.Client(address, deadline_s=20) as client:
        job = client.create_job("run", reference_model="r", policy=POLICY, world_size=2)
        job.submit("a", ["k"], step=0)
        job.upload("a", [0], {"image": np.zeros((1, 1), np.uint8)})
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(job.select("a", pair())))
        waiting.start()  # waits for the other rank, which never comes
        until(lambda: bool(client.server_info()) and waiting.is_alive())
        process.kill()
        process.wait()
        again = ScriptedServer(int(address.rpartition(":")[2]), cached={"k"})
        again.jobs = {"run": server_side(job)}
        again.submissions = {
            ("run", "a", rank): selection_pb2.SubmitSuperBatchRequest(example_keys=["k"]) for rank in (0, 1)
        }
        again._rows["run", "a"][1] = 1
        waiting.join()
        assert answers[0].positions.tolist() == [0]
    again.stop()


# Deadlines


def test_a_server_that_never_answers_is_given_up_at_the_deadline(server):
    never = threading.Event()
    server.script["GetServerInfo"].append(hold(never))
    with jest.Client(server.address, deadline_s=0.5) as client, within(1.5), pytest.raises(jest.JestError) as caught:
        client.server_info()
    assert (caught.value.code, caught.value.reason) == (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    assert "did not answer in time" in str(caught.value)
    assert server.count("GetServerInfo") == 1


def test_every_call_to_a_stopped_process_ends_with_its_deadline(process_server):
    process, address = process_server
    with jest.Client(address, deadline_s=0.7) as client:
        job = client.create_job("run", reference_model="r", policy=POLICY)
        job.submit("a", ["k"], step=0)
        os.kill(process.pid, signal.SIGSTOP)
        for call in (
            client.server_info,
            job.counters,
            lambda: job.submit("b", ["k"], step=0),
            lambda: job.upload("a", [0], {"image": np.zeros((1, 8 << 20), np.uint8)}),
            lambda: job.select("a", pair()),
        ):
            with within(1.7), pytest.raises(jest.JestError) as caught:
                call()
            assert caught.value.code is Code.DEADLINE_EXCEEDED
        os.kill(process.pid, signal.SIGCONT)


def pair():
    return jest.Embeddings(torch.ones(1, 2), torch.ones(1, 2), scale=1.0)


def server_side(job):
    policy = jobs_pb2.SelectionPolicy(sub_batch_size=job.world_size)
    return jobs_pb2.JobSpec(name=job.name, world_size=job.world_size, policy=policy)


def test_a_port_that_swallows_everything_is_given_up_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0), backlog=1) as black_hole:
        address = f"127.0.0.1:{black_hole.getsockname()[1]}"
        with jest.Client(address, deadline_s=0.7) as client, within(1.7), pytest.raises(jest.JestError):
            client.server_info()


def test_a_port_where_nobody_listens_is_given_up_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    unreachable = pytest.raises(jest.JestError, match="could not be reached; check the address")
    with jest.Client(f"127.0.0.1:{port}", deadline_s=0.7) as client, within(1.7), unreachable as caught:
        client.server_info()
    assert caught.value.code is Code.UNAVAILABLE


def test_a_call_is_given_up_even_when_grpc_does_not_keep_its_own_deadline(server, client, monkeypatch):
    never = threading.Event()
    server.script["GetServerInfo"].append(hold(never))
    client.create_job("run", reference_model="r", policy=POLICY)
    stub = next(iter(client._connection._opened.values())).selection
    start = stub.GetServerInfo.future
    monkeypatch.setattr(client, "_deadline_s", 0.3)
    monkeypatch.setattr(stub, "GetServerInfo", _WithoutTimeout(start))
    with within(1.3), pytest.raises(jest.JestError, match=r"nothing within 0\.3 s") as caught:
        client.server_info()
    assert caught.value.code is Code.DEADLINE_EXCEEDED


class _WithoutTimeout:
    def __init__(self, start):
        self._start = start

    def future(self, request, *, metadata, **_timeout):
        return self._start(request, metadata=metadata)


# Cancellation


def test_cancelling_ends_the_call_in_flight_at_once(server, job, until):
    never = threading.Event()
    server.script["SubmitSuperBatch"].append(hold(never))
    cancellation, raised = Cancellation(), []

    def submit():
        try:
            job.calls("a", 0).submit(["k"], job.deadline(cancellation), step=0)
        except Cancelled as error:
            raised.append(error)

    caller = threading.Thread(target=submit)
    caller.start()
    until(lambda: server.count("SubmitSuperBatch") == 1)
    with within(1.0):
        cancellation.cancel()
        caller.join()
    assert raised


def test_cancelling_ends_the_pause_between_two_attempts(server, job, until):
    server.script["SubmitSuperBatch"].append(fail(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after_s=3))
    cancellation = Cancellation()
    threading.Timer(0.2, cancellation.cancel).start()
    with within(1.5), pytest.raises(Cancelled):
        job.calls("a", 0).submit(["k"], job.deadline(cancellation), step=0)


def test_nothing_is_called_after_cancelling(server, job):
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        job.calls("a", 0).submit(["k"], job.deadline(cancellation), step=0)


def test_an_interrupt_cancels_the_call_in_flight(server, client, until):
    gone = threading.Event()

    def notice(context):
        context.add_callback(gone.set)
        hold(gone)(context)

    server.script["GetServerInfo"].append(notice)
    main = threading.get_ident()

    def interrupt():
        until(lambda: server.count("GetServerInfo") == 1)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with within(3.0), pytest.raises(KeyboardInterrupt):
        client.server_info()
    assert gone.wait(30)


def test_closing_the_client_ends_calls_of_other_threads(server, client, until):
    never = threading.Event()
    server.script["GetServerInfo"].append(hold(never))
    errors = []

    def call():
        try:
            client.server_info()
        except jest.JestError as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    until(lambda: server.count("GetServerInfo") == 1)
    with within(2.0):
        client.close()
        caller.join()
    assert errors
