import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from conformance.speaker import TIMEOUT_S, refusal_of
from jest_proto.v1 import jobs_pb2


def test_creating_a_job_twice_returns_the_same_job(speaker):
    request = jobs_pb2.CreateJobRequest(spec=speaker.job_spec())
    first = speaker.jobs.CreateJob(request, timeout=TIMEOUT_S)
    second = speaker.jobs.CreateJob(request, timeout=TIMEOUT_S)
    assert (first.created, second.created) == (True, False)
    assert first.job.spec == second.job.spec
    assert first.job.created_at == second.job.created_at


def test_unset_fields_become_the_defaults_that_the_contract_tells(speaker):
    spec = speaker.create_job(policy=jobs_pb2.SelectionPolicy(sub_batch_size=16)).spec
    assert spec.policy.num_chunks == 16
    assert spec.policy.gain == 1
    assert spec.policy.scoring == jobs_pb2.SCORING_LEARNABILITY
    assert spec.policy.normalization == jobs_pb2.NORMALIZATION_SUM
    assert spec.policy.sampler == jobs_pb2.SAMPLER_GUMBEL
    assert spec.policy.placement == jobs_pb2.PLACEMENT_PER_RANK
    assert spec.policy.loss == jobs_pb2.LOSS_SIGMOID
    assert spec.policy.precision == jobs_pb2.PRECISION_FLOAT32
    assert not spec.policy.weights
    assert not spec.policy.HasField("max_per_group")
    assert not spec.policy.HasField("gain_schedule")
    assert (spec.world_size, spec.max_in_flight, spec.weight) == (1, 64, 1)
    assert spec.fallback == jobs_pb2.FALLBACK_FAIL
    assert spec.reference_timeout == Duration(seconds=30)
    assert spec.super_batch_ttl == Duration(seconds=600)


def test_a_name_with_another_spec_is_a_conflict_that_names_the_difference(speaker):
    spec = speaker.create_job().spec
    other = jobs_pb2.JobSpec()
    other.CopyFrom(spec)
    other.seed += 1
    with pytest.raises(grpc.RpcError) as caught:
        speaker.jobs.CreateJob(jobs_pb2.CreateJobRequest(spec=other), timeout=TIMEOUT_S)
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "JOB_CONFLICT")
    assert "seed = 11" in refusal.message
    assert "12" in refusal.message


SCHEDULE = jobs_pb2.Schedule(shape=jobs_pb2.Schedule.SHAPE_COSINE, start=0.5, end=0.75, steps=1000, warmup_steps=10)


def policy(**fields):
    return jobs_pb2.SelectionPolicy(**fields)


def test_every_field_of_a_policy_comes_back_as_it_was_sent(speaker):
    sent = policy(
        scoring=jobs_pb2.SCORING_HARD_LEARNER,
        loss=jobs_pb2.LOSS_SOFTMAX,
        filter_ratio_schedule=SCHEDULE,
        num_chunks=4,
        normalization=jobs_pb2.NORMALIZATION_MEAN,
        sampler=jobs_pb2.SAMPLER_TOP_K,
        placement=jobs_pb2.PLACEMENT_GLOBAL,
        gain_schedule=jobs_pb2.Schedule(shape=jobs_pb2.Schedule.SHAPE_CONSTANT, start=2.0, warmup_steps=5),
        max_per_group=3,
        weights=True,
        precision=jobs_pb2.PRECISION_BFLOAT16,
    )
    spec = speaker.job_spec(policy=sent)
    created = speaker.jobs.CreateJob(jobs_pb2.CreateJobRequest(spec=spec), timeout=TIMEOUT_S).job
    assert created.spec.policy == sent
    assert not speaker.jobs.CreateJob(jobs_pb2.CreateJobRequest(spec=spec), timeout=TIMEOUT_S).created


def test_a_gain_of_nothing_is_uniform_sampling_and_allowed(speaker):
    assert speaker.create_job(policy=policy(sub_batch_size=16, gain=0)).spec.policy.gain == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"scoring": jobs_pb2.SCORING_UNIFORM},
        {"scoring": jobs_pb2.SCORING_HARD_LEARNER, "loss": jobs_pb2.LOSS_PAIRWISE},
        {"loss": jobs_pb2.LOSS_PER_EXAMPLE},
    ],
)
def test_a_job_that_needs_no_reference_model_may_have_none(speaker, fields):
    job = speaker.create_job(reference_model="", policy=policy(sub_batch_size=16, **fields))
    assert (job.spec.reference_model, job.HasField("reference")) == ("", False)
    listed = speaker.jobs.GetJob(jobs_pb2.GetJobRequest(name=job.spec.name), timeout=TIMEOUT_S).job
    assert not listed.HasField("reference")


def test_a_reference_model_that_is_named_has_to_be_served_though_it_is_not_needed(speaker):
    with pytest.raises(grpc.RpcError) as caught:
        speaker.create_job(
            reference_model="nobody-serves-this",
            policy=policy(sub_batch_size=16, scoring=jobs_pb2.SCORING_UNIFORM),
        )
    assert refusal_of(caught.value).reason == "REFERENCE_UNAVAILABLE"
    speaker._made.clear()


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ({"shape": 9, "start": 1}, "SHAPE_LINEAR"),
        ({"start": float("nan")}, "start (nan)"),
        ({"start": 1, "end": 2}, "end (2.0) must be None for the shape 'constant'"),
        ({"start": 1, "steps": 2}, "steps (2) must be None for the shape 'constant'"),
        ({"shape": jobs_pb2.Schedule.SHAPE_LINEAR, "start": 1, "steps": 2}, "end (None)"),
        ({"shape": jobs_pb2.Schedule.SHAPE_LINEAR, "start": 1, "end": float("inf"), "steps": 2}, "end (inf)"),
        ({"shape": jobs_pb2.Schedule.SHAPE_COSINE, "start": 1, "end": 2}, "steps (None)"),
        ({"shape": jobs_pb2.Schedule.SHAPE_COSINE, "start": 1, "end": 2, "steps": 0}, "steps (0)"),
    ],
)
@pytest.mark.parametrize("field", ["gain_schedule", "filter_ratio_schedule"])
def test_an_impossible_schedule_is_refused(speaker, field, schedule, says):
    size = {} if field == "filter_ratio_schedule" else {"sub_batch_size": 16}
    with pytest.raises(grpc.RpcError) as caught:
        speaker.create_job(policy=policy(**size, **{field: jobs_pb2.Schedule(**schedule)}))
    refusal = refusal_of(caught.value)
    assert refusal.fields[0].startswith(f"spec.policy.{field}")
    assert says in refusal.message
    speaker._made.clear()


@pytest.mark.parametrize(
    ("overrides", "field", "says"),
    [
        ({"name": "no spaces"}, "spec.name", "no spaces"),
        ({"name": ""}, "spec.name", "pattern"),
        ({"reference_model": ""}, "spec.reference_model", "needs the reference model"),
        ({"world_size": 0}, "spec.world_size", "greater than or equal to 1"),
        ({"weight": 0}, "spec.weight", "greater than or equal to 0.001"),
        ({"weight": float("nan")}, "spec.weight", "less than or equal to 1000"),
        ({"weight": 1001}, "spec.weight", "less than or equal to 1000"),
        ({"policy": jobs_pb2.SelectionPolicy()}, "spec.policy.size", "expected one of sub_batch_size, filter_ratio"),
        ({"policy": jobs_pb2.SelectionPolicy(filter_ratio="1.5")}, "spec.policy", "1.5"),
        ({"policy": jobs_pb2.SelectionPolicy(filter_ratio="much")}, "spec.policy", "much"),
        ({"policy": jobs_pb2.SelectionPolicy(filter_ratio="nan")}, "spec.policy", "nan"),
        ({"policy": jobs_pb2.SelectionPolicy(sub_batch_size=8, num_chunks=9)}, "spec.policy", "num_chunks"),
        ({"policy": jobs_pb2.SelectionPolicy(sub_batch_size=8, gain=-1)}, "spec.policy.gain", "-1"),
        ({"policy": jobs_pb2.SelectionPolicy(sub_batch_size=8, gain=float("inf"))}, "spec.policy.gain", "inf"),
        ({"policy": jobs_pb2.SelectionPolicy(sub_batch_size=8, scoring=77)}, "spec.policy.scoring", "77"),
        ({"policy": policy(sub_batch_size=8, loss=77)}, "spec.policy.loss", "LOSS_SOFTMAX"),
        ({"policy": policy(sub_batch_size=8, precision=77)}, "spec.policy.precision", "PRECISION_BFLOAT16"),
        ({"policy": policy(sub_batch_size=8, max_per_group=0)}, "spec.policy.max_per_group", "0"),
        ({"policy": policy(sub_batch_size=8, gain=2, gain_schedule=SCHEDULE)}, "spec.policy.gain_schedule", "gain (2)"),
        (
            {"policy": policy(sub_batch_size=16, weights=True, scoring=jobs_pb2.SCORING_EASY_REFERENCE)},
            "spec.policy",
            "weights need a scoring that knows the learner's loss",
        ),
        (
            {"policy": policy(filter_ratio_schedule=jobs_pb2.Schedule(start=1.0))},
            "spec.policy",
            "filter_ratio (from 1 to 1) must lie in [0, 1)",
        ),
        (
            {"policy": policy(sub_batch_size=16, gain_schedule=jobs_pb2.Schedule(start=-1.0))},
            "spec.policy",
            "gain (from -1 to -1) must be at least 0",
        ),
        (
            {"reference_model": "", "policy": policy(sub_batch_size=16, loss=jobs_pb2.LOSS_PAIRWISE)},
            "spec.reference_model",
            "needs the reference model",
        ),
        ({"fallback": 9}, "spec.fallback", "9"),
        ({"reference_timeout": Duration(seconds=-1)}, "spec.reference_timeout_s", "-1"),
        ({"super_batch_ttl": Duration(seconds=0)}, "spec.super_batch_ttl_s", "0"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_was_expected(speaker, overrides, field, says):
    with pytest.raises(grpc.RpcError) as caught:
        speaker.create_job(**overrides)
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert refusal.fields == [field]
    assert says in refusal.message
    speaker._made.clear()


def test_a_reference_model_that_nobody_serves_is_refused_with_a_time_to_come_back(speaker):
    with pytest.raises(grpc.RpcError) as caught:
        speaker.create_job(reference_model="nobody-serves-this")
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REFERENCE_UNAVAILABLE")
    assert refusal.retry_after_s > 0


def test_an_unknown_job_is_not_found(speaker):
    with pytest.raises(grpc.RpcError) as caught:
        speaker.jobs.GetJob(jobs_pb2.GetJobRequest(name="never-made"), timeout=TIMEOUT_S)
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "JOB_UNKNOWN")
    assert "never-made" in refusal.message


def test_a_job_tells_what_its_reference_model_needs(speaker):
    reference = speaker.create_job().reference
    assert reference.name == speaker.reference_model
    assert reference.version
    assert reference.preprocessing_id
    assert reference.scale > 0
    assert reference.embedding_width > 0
    assert len(reference.inputs) >= 2


def test_listing_goes_page_by_page_through_all_jobs_in_order(speaker):
    made = sorted(speaker.create_job().spec.name for _ in range(5))
    names, token = [], ""
    while True:
        page = speaker.jobs.ListJobs(jobs_pb2.ListJobsRequest(page_size=2, page_token=token), timeout=TIMEOUT_S)
        assert len(page.jobs) <= 2
        names += [job.spec.name for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
    assert names == sorted(names)
    assert set(made) <= set(names)


def test_a_page_of_an_impossible_size_is_refused(speaker):
    with pytest.raises(grpc.RpcError) as caught:
        speaker.jobs.ListJobs(jobs_pb2.ListJobsRequest(page_size=0), timeout=TIMEOUT_S)
    assert refusal_of(caught.value).fields == ["page_size"]


def test_a_deleted_job_is_gone_and_deleting_it_again_does_no_harm(speaker):
    name = speaker.create_job().spec.name
    request = jobs_pb2.DeleteJobRequest(name=name)
    assert speaker.jobs.DeleteJob(request, timeout=TIMEOUT_S).deleted
    assert not speaker.jobs.DeleteJob(request, timeout=TIMEOUT_S).deleted
    with pytest.raises(grpc.RpcError):
        speaker.jobs.GetJob(jobs_pb2.GetJobRequest(name=name), timeout=TIMEOUT_S)
