"""What the running processes' metrics say of a real training loop."""

from __future__ import annotations

import urllib.request

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

import jest_trainer
from jest_core import SelectionPolicy
from jest_proto.v1 import jobs_pb2, jobs_pb2_grpc
from support.learner import TinyLearner, selected, super_batches
from support.polling import wait_until

POLICY = SelectionPolicy(filter_ratio=0.75, num_chunks=4)
STEPS, ROWS = 4, 64


@pytest.fixture
def client(stack):
    with jest_trainer.Client(stack.address, deadline_s=30) as client:
        yield client


@pytest.fixture
def samples(stack):
    """Reads the selector's samples of a metric: values by labels."""

    def read(name):
        with urllib.request.urlopen(stack.endpoints()["selector metrics"]) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        found = (sample for family in families for sample in family.samples if sample.name == name)
        return {tuple(sorted(sample.labels.items())): sample.value for sample in found}

    return read


def train(client, name, seed):
    job = client.create_job(name, reference_model="jest_reference", policy=POLICY)
    learner = TinyLearner(seed=0)
    batches = selected(job, learner, super_batches(count=STEPS, rows=ROWS, seed=seed))
    for batch in batches:
        learner.step(batch)
    return batches


def test_a_job_s_series_tell_its_accounts_until_it_is_deleted(stack, client, samples, unique):
    name = unique("measured")
    batches = train(client, name, seed=31)

    def of_job(metric, **labels):
        return samples(metric).get(tuple(sorted({"jest_job": name, **labels}.items())))

    assert of_job("jest_job_decisions_total", fallback="none") == STEPS
    assert of_job("jest_job_decisions_total", fallback="uniform") == 0
    assert of_job("jest_job_examples_loaded_total") == STEPS * ROWS == batches.stats.examples_loaded
    assert of_job("jest_job_examples_selected_total") == STEPS * ROWS / 4 == batches.stats.examples_trained
    assert of_job("jest_job_reference_inferences_total") == STEPS * ROWS
    assert of_job("jest_job_reference_cache_hits_total") == 0
    assert of_job("jest_job_ranks") == 1
    assert of_job("jest_job_sampling_perplexity") == pytest.approx(batches.stats.perplexity, rel=1e-5)
    assert of_job("jest_job_learnability", rows="chosen") > of_job("jest_job_learnability", rows="dropped")
    assert 0 < of_job("jest_job_trainer_seconds_total", phase="select") <= batches.stats.select_seconds
    assert of_job("jest_job_stage_seconds_total", stage="compute") > 0
    with grpc.insecure_channel(stack.address) as channel:
        assert jobs_pb2_grpc.JobServiceStub(channel).DeleteJob(jobs_pb2.DeleteJobRequest(name=name)).deleted
    wait_until(lambda: of_job("jest_job_examples_loaded_total") is None)
    assert of_job("jest_job_learnability", rows="chosen") is None


def test_trainers_steps_but_the_first_are_counted_by_phase(client, samples, unique):
    before = samples("jest_trainer_steps_total")[()], samples("jest_trainer_step_seconds_total")
    train(client, unique("steps"), seed=32)
    assert samples("jest_trainer_steps_total")[()] - before[0] == STEPS - 1
    after = samples("jest_trainer_step_seconds_total")
    assert {dict(labels)["phase"] for labels in after} == {"load", "embed", "select", "train"}
    assert all(after[labels] > before[1][labels] for labels in after)


def test_refused_calls_are_counted_by_reason(client, samples):
    labels = (("limit", "none"), ("method", "/jest.v1.JobService/GetJob"), ("reason", "JOB_UNKNOWN"))
    before = samples("jest_rpc_refusals_total").get(labels, 0)
    with pytest.raises(jest_trainer.JestError):
        client.get_job("nobody")
    assert samples("jest_rpc_refusals_total")[labels] == before + 1


def test_both_stores_memory_is_told(samples):
    wait_until(lambda: samples("jest_redis_memory_bytes"))
    assert {dict(labels)["store"] for labels in samples("jest_redis_memory_bytes")} == {"queue", "cache"}
    assert all(value > 0 for value in samples("jest_redis_memory_bytes").values())
