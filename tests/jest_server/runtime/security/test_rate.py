import asyncio

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

import jest_trainer as jest
from conformance.speaker import refusal_of
from jest_proto.v1 import jobs_pb2, jobs_pb2_grpc
from jest_server.domain.errors import RateLimited
from jest_server.runtime.grpc_server import GrpcServer
from jest_server.runtime.metrics import SelectorMetrics
from jest_server.runtime.security import rate
from jest_server.runtime.security.rate import BURST_S, CallRates, RateLimit
from jest_server.runtime.settings import ProcessSettings
from jest_server.selector.intake.open_attempt import OpenAttempt
from jest_server.selector.service import JobServicer
from jest_server.use_cases.jobs import JobRegistry
from support.memory_stores.stores import open_memory_stores


def limit_of(calls_per_s):
    return RateLimit(calls_per_s, setting="JEST_SETTING", whose="caller {name}")


def is_admitted(admit, *args, **kwargs):
    try:
        admit(*args, **kwargs)
    except RateLimited:
        return False
    return True


def allowed(limit, now_s, name="vision"):
    if not is_admitted(limit.require_room, name, now_s=now_s):
        return False
    limit.count(name, now_s=now_s)
    return True


@given(
    calls_per_s=st.floats(0.05, 1000),
    pauses=st.lists(st.floats(0, 3), min_size=1, max_size=300),
)
def test_in_no_stretch_of_time_are_there_more_calls_than_the_rate_and_one_burst(calls_per_s, pauses):
    limit, now, times = limit_of(calls_per_s), 100.0, []
    for pause in pauses:
        now += pause
        if allowed(limit, now):
            times.append(now)
    burst = max(BURST_S * calls_per_s, 1)
    for first, start in enumerate(times):
        for last, end in enumerate(times[first:], first):
            assert last - first + 1 <= burst + (end - start) * calls_per_s + 1e-6


@given(calls_per_s=st.floats(0.05, 1000), seed=st.floats(0, 1e6))
def test_who_comes_back_when_told_is_served(calls_per_s, seed):
    limit, now = limit_of(calls_per_s), seed
    while allowed(limit, now):
        pass
    with pytest.raises(RateLimited, match=r"calls a second of caller vision \(JEST_SETTING\)") as caught:
        limit.require_room("vision", now_s=now)
    assert 0 < caught.value.retry_after_s <= 1 / calls_per_s + 1e-6
    assert allowed(limit, now + caught.value.retry_after_s + 1e-6)


def test_one_names_calls_cost_another_nothing():
    limit = limit_of(1)
    while allowed(limit, 0.0):
        pass
    assert allowed(limit, 0.0, "speech")


def test_names_that_went_away_are_forgotten(monkeypatch):
    monkeypatch.setattr(rate, "_SWEEP_AT", 10)
    limit = limit_of(1)
    for number in range(1000):
        assert allowed(limit, 10.0 * number, f"tenant-{number}")
    assert len(limit._paid_until_s) <= 11


def test_without_a_limit_as_many_calls_as_come_are_admitted():
    rates = CallRates(ProcessSettings())
    for _ in range(100_000):
        rates.admit("vision", now_s=0.0)
        rates.admit_to_job("run", now_s=0.0)


def test_all_callers_together_have_a_limit_beside_each_tenants():
    rates = CallRates(ProcessSettings(max_calls_per_s=3, max_calls_per_s_per_tenant=2))
    admitted = [is_admitted(rates.admit, tenant, now_s=0.0) for tenant in ["a"] * 5 + ["b"] * 5]
    assert admitted == [True] * 4 + [False] + [True] * 2 + [False] * 3
    with pytest.raises(RateLimited, match=r"more than 3 calls a second of all callers together"):
        rates.admit("b", now_s=0.0)


def test_a_call_that_is_refused_counts_nowhere():
    rates = CallRates(ProcessSettings(max_calls_per_s=1, max_calls_per_s_per_tenant=1))
    for _ in range(2):
        rates.admit("a", now_s=0.0)
    assert not any(is_admitted(rates.admit, tenant, now_s=0.0) for tenant in ["a", "b"] * 10)
    assert [is_admitted(rates.admit, "b", now_s=2.0) for _ in range(3)] == [True, True, False]


def test_a_jobs_calls_cost_another_job_nothing():
    rates = CallRates(ProcessSettings(max_calls_per_s_per_job=1))
    assert [is_admitted(rates.admit_to_job, "run", now_s=0.0) for _ in range(3)] == [True, True, False]
    with pytest.raises(RateLimited, match=r"more than 1 calls a second of job run \(JEST_MAX_CALLS_PER_S_PER_JOB\)"):
        rates.admit_to_job("run", now_s=0.0)
    rates.admit_to_job("other", now_s=0.0)


@pytest.mark.parametrize("limit", ["max_calls_per_s", "max_calls_per_s_per_tenant", "max_calls_per_s_per_job"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "many"])
def test_a_limit_that_cannot_be_is_refused_at_the_start(limit, value):
    with pytest.raises(ValidationError, match=limit):
        ProcessSettings(**{limit: value})


@pytest.fixture
async def address():
    """A real server that lets each tenant make two calls a second, four at once."""
    settings = ProcessSettings(listen="127.0.0.1:0", max_calls_per_s_per_tenant=2, drain_delay_s=0, grace_s=1)
    metrics, stores = SelectorMetrics(CollectorRegistry()), open_memory_stores()
    server = GrpcServer(settings, metrics.rpc)
    jobs = JobRegistry(stores.jobs, max_world_size=8)
    attempt = OpenAttempt(jobs, stores.jobs, stores.decisions, metrics)
    jobs_pb2_grpc.add_JobServiceServicer_to_server(JobServicer(jobs, attempt), server.server)
    yield f"127.0.0.1:{await server.start(())}"
    await server.drain()


async def call_without_end(stub):
    while True:
        await stub.ListJobs(jobs_pb2.ListJobsRequest(), timeout=5)


async def test_a_caller_beyond_the_rate_is_told_when_to_come_back(address):
    async with grpc.aio.insecure_channel(address) as channel:
        stub = jobs_pb2_grpc.JobServiceStub(channel)
        for _ in range(4):
            await stub.ListJobs(jobs_pb2.ListJobsRequest(), timeout=5)
        with pytest.raises(grpc.aio.AioRpcError, match=r"more than 2 calls a second") as caught:
            await call_without_end(stub)
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert 0 < refusal.retry_after_s <= 0.5


async def test_the_sdk_waits_its_turn_within_its_deadline(address):
    policy = jest.SelectionPolicy(scoring="uniform", filter_ratio=0.5)

    def make_jobs():
        with jest.Client(address, deadline_s=20) as client:
            return [client.create_job(f"job-{number}", policy=policy).name for number in range(7)]

    assert len(await asyncio.to_thread(make_jobs)) == 7
