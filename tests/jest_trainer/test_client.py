from __future__ import annotations

import grpc
import pytest
from scripted_server import ScriptedServer, fail

import jest_trainer as jest
from jest_proto.v1 import jobs_pb2
from support.certificates import make_authority, needs_openssl, sign

POLICY = jest.SelectionPolicy(filter_ratio=0.8)


def test_nothing_is_sent_before_the_first_call(server):
    with jest.Client(server.address):
        pass
    assert server.seen == []


def test_a_job_s_spec_arrives_with_every_field_set(server, client):
    policy = jest.SelectionPolicy(
        scoring="easy_reference",
        filter_ratio=0.8,
        num_chunks=4,
        gain=2.0,
        normalization="mean",
        sampler="top_k",
        placement="global",
    )
    client.create_job(
        "run",
        reference_model="r",
        policy=policy,
        seed=2**64 - 1,
        world_size=4,
        fallback="uniform",
        reference_timeout_s=1.5,
        max_in_flight=3,
        weight=2.5,
        super_batch_ttl_s=60,
    )
    expected = jobs_pb2.JobSpec(
        name="run",
        reference_model="r",
        policy=jobs_pb2.SelectionPolicy(
            scoring=jobs_pb2.SCORING_EASY_REFERENCE,
            loss=jobs_pb2.LOSS_SIGMOID,
            filter_ratio="0.8",
            num_chunks=4,
            gain=2.0,
            normalization=jobs_pb2.NORMALIZATION_MEAN,
            sampler=jobs_pb2.SAMPLER_TOP_K,
            placement=jobs_pb2.PLACEMENT_GLOBAL,
            precision=jobs_pb2.PRECISION_FLOAT32,
        ),
        world_size=4,
        seed=2**64 - 1,
        fallback=jobs_pb2.FALLBACK_UNIFORM,
        max_in_flight=3,
        weight=2.5,
    )
    expected.reference_timeout.FromMilliseconds(1500)
    expected.super_batch_ttl.FromSeconds(60)
    assert server.requests("CreateJob")[0].spec == expected


def test_a_sub_batch_size_is_sent_instead_of_a_ratio(server, client):
    client.create_job("run", reference_model="r", policy=jest.SelectionPolicy(sub_batch_size=32))
    policy = server.requests("CreateJob")[0].spec.policy
    assert (policy.WhichOneof("size"), policy.sub_batch_size) == ("sub_batch_size", 32)


def test_a_created_job_knows_its_world_and_its_reference_model(client):
    job = client.create_job("run", reference_model="r", policy=POLICY, world_size=2)
    assert (job.name, job.world_size, job.fallback, job.reference_timeout_s) == ("run", 2, "fail", 30.0)
    assert (job.reference.name, job.reference.version, job.reference.scale) == ("reference", "7", 10.0)
    assert [(i.name, i.datatype, i.shape) for i in job.reference.inputs] == [
        ("image", "UINT8", (3, -1, -1)),
        ("tokens", "INT32", (4,)),
    ]


def test_a_job_is_found_by_its_name_with_its_spec(client):
    client.create_job(
        "run", reference_model="r", policy=POLICY, world_size=2, fallback="uniform", reference_timeout_s=1
    )
    job = client.get_job("run")
    assert (job.name, job.world_size, job.fallback, job.reference_timeout_s) == ("run", 2, "uniform", 1.0)
    assert job.counters().submitted == 5


def test_the_policy_of_a_found_job_is_the_one_it_was_made_with(client):
    policy = jest.SelectionPolicy(
        loss="softmax", filter_ratio=jest.Schedule(start=0.5), gain=0.0, max_per_group=2, weights=True
    )
    assert client.create_job("run", reference_model="r", policy=policy).policy == policy
    assert client.get_job("run").policy == policy


def test_a_policy_of_a_newer_version_is_an_error_that_says_so(server, client):
    client.create_job("run", reference_model="r", policy=POLICY)
    server.jobs["run"].policy.scoring = 99
    with pytest.raises(
        jest.JestError, match=r"job 'run' cannot be read, it may need a newer version.*policy.scoring is 99"
    ) as caught:
        client.get_job("run")
    assert caught.value.reason == "BAD_ANSWER"


@pytest.mark.parametrize("fields", [{"scoring": "uniform"}, {"scoring": "hard_learner"}, {"loss": "per_example"}])
@pytest.mark.parametrize("reference_model", [None, ""])
def test_a_policy_that_needs_no_reference_model_needs_none_named(server, client, fields, reference_model):
    policy = jest.SelectionPolicy(filter_ratio=0.8, **fields)
    job = client.create_job("run", reference_model=reference_model, policy=policy)
    assert job.reference is None
    assert server.requests("CreateJob")[0].spec.reference_model == ""


@pytest.mark.parametrize("fields", [{}, {"scoring": "easy_reference"}, {"loss": "softmax"}, {"loss": "pairwise"}])
@pytest.mark.parametrize("reference_model", [None, ""])
def test_a_policy_that_needs_a_reference_model_says_so_before_anything_is_sent(server, client, fields, reference_model):
    policy = jest.SelectionPolicy(filter_ratio=0.8, **fields)
    with pytest.raises(ValueError, match=r"reference_model \((None|'')\) must name a model: scoring .* under loss"):
        client.create_job("run", reference_model=reference_model, policy=policy)
    assert server.seen == []


def test_an_unknown_job_is_an_error_with_its_reason(client):
    with pytest.raises(jest.JestError, match="create it first") as caught:
        client.get_job("nope")
    assert caught.value.reason == "JOB_UNKNOWN"


def test_a_deleted_job_is_gone_and_deleting_it_again_is_no_error(server, client):
    client.create_job("run", reference_model="r", policy=POLICY)
    assert client.delete_job("run") is True
    assert client.delete_job("run") is False
    assert [request.name for request in server.requests("DeleteJob")] == ["run", "run"]
    with pytest.raises(jest.JestError) as caught:
        client.get_job("run")
    assert caught.value.reason == "JOB_UNKNOWN"


def test_a_name_that_the_server_refuses_to_delete_is_an_error_with_its_reason(server, client):
    refusal = fail(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "name is empty", violations={"name": "empty"})
    server.script["DeleteJob"].append(refusal)
    with pytest.raises(jest.JestError, match=r"^DeleteJob was refused by .*name is empty") as caught:
        client.delete_job("")
    assert (caught.value.reason, caught.value.field_violations) == ("INVALID_FIELD", {"name": "empty"})


def test_server_info_tells_version_limits_and_abilities(client):
    info = client.server_info()
    assert (info.version, info.scorings, info.losses) == (
        "1.2.3",
        ("learnability", "hard_learner"),
        ("sigmoid", "per_example"),
    )
    assert (info.max_rows_per_rank, info.max_world_size, info.learner_datatypes) == (10, 8, ("FP32",))
    assert (info.max_pair_loss_bytes, info.precisions) == (1 << 33, ("float32", "bfloat16"))


def test_the_token_travels_as_bearer_and_shows_nowhere(server, caplog):
    server.script["GetServerInfo"].append(fail(grpc.StatusCode.UNAVAILABLE))
    server.script["GetServerInfo"].append(fail(grpc.StatusCode.UNAUTHENTICATED))
    with jest.Client(server.address, token="s3cret", deadline_s=5) as client, pytest.raises(jest.JestError) as caught:
        client.server_info()
    assert [call.metadata["authorization"] for call in server.seen] == ["Bearer s3cret"] * 2
    assert "s3cret" not in repr(client) + repr(caught.value) + caplog.text
    assert caplog.text


def test_without_a_token_no_authorization_is_sent(server, client):
    client.server_info()
    assert "authorization" not in server.seen[0].metadata


def test_tls_credentials_are_used(server):
    # The server speaks plain text: a client with TLS must not be able to talk to it.
    credentials = grpc.ssl_channel_credentials()
    with jest.Client(server.address, credentials=credentials, deadline_s=0.5) as client, pytest.raises(jest.JestError):
        client.server_info()
    assert server.seen == []


def test_a_closed_client_says_so(client):
    client.close()
    with pytest.raises(jest.JestError, match="the client is closed") as caught:
        client.server_info()
    assert caught.value.reason == "CLIENT_CLOSED"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"address": ""}, "address is empty"),
        ({"deadline_s": 0}, r"deadline_s \(0\)"),
        ({"deadline_s": float("inf")}, r"deadline_s \(inf\)"),
        ({"token": ""}, "token must be"),
        ({"token": "a b"}, "token must be"),
        ({"token": "a\n"}, "token must be"),
    ],
)
def test_what_a_client_cannot_be_made_of_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        jest.Client(**{"address": "h:1"} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fallback": "hope"}, r"fallback \('hope'\) must be one of fail, uniform, hard_learner"),
        ({"seed": -1}, r"seed \(-1\)"),
        ({"seed": 2**64}, r"seed \(18446744073709551616\)"),
        ({"world_size": 0}, r"world_size \(0\)"),
        ({"max_in_flight": 0}, r"max_in_flight \(0\)"),
        ({"weight": 0}, r"weight \(0\) must lie in \[0.001, 1000\]"),
        ({"weight": float("nan")}, r"weight \(nan\) must lie in \[0.001, 1000\]"),
        ({"reference_timeout_s": float("nan")}, r"reference_timeout_s \(nan\)"),
        ({"super_batch_ttl_s": -1.0}, r"super_batch_ttl_s \(-1.0\)"),
        ({"fallback": "uniform", "reference_timeout_s": 20.0}, "never gets its turn"),
    ],
)
def test_what_a_job_cannot_be_made_of_is_named_before_anything_is_sent(server, client, arguments, message):
    with pytest.raises(ValueError, match=message):
        client.create_job("run", **{"reference_model": "r", "policy": POLICY} | arguments)
    assert server.seen == []


@needs_openssl
def test_a_server_with_tls_is_spoken_to_through_tls(tmp_path):
    authority = make_authority(tmp_path)
    pair = sign(authority, tmp_path, "server")
    own = grpc.ssl_server_credentials([(pair.key.read_bytes(), pair.certificate.read_bytes())])
    server = ScriptedServer(credentials=own)
    roots = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
    with jest.Client(f"localhost:{server.port}", credentials=roots, token="t", deadline_s=5) as client:
        assert client.server_info().version == "1.2.3"
    assert server.seen[0].metadata["authorization"] == "Bearer t"
    server.stop()
