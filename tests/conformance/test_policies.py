"""What a policy may ask for beyond the default: other losses, schedules, limits of groups, weights."""

import grpc
import numpy as np
import pytest

from conformance.speaker import TIMEOUT_S, features, fresh_keys, refused, unit_embeddings
from jest_proto.v1 import jobs_pb2, selection_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PER_EXAMPLE = jobs_pb2.LOSS_PER_EXAMPLE


def policy(**fields):
    size = {} if "filter_ratio_schedule" in fields else {"sub_batch_size": 4}
    return jobs_pb2.SelectionPolicy(**({"num_chunks": 2} | size | fields))


@pytest.fixture
def prepared(speaker):
    """Makes a job and a super-batch of sixteen rows that only lacks its learner outputs."""

    def prepare(fields=None, *, keys=None, **submitted):
        job, keys = speaker.create_job(policy=policy(**(fields or {}))), keys or fresh_keys(16)
        missing = list(speaker.submit(job.spec.name, "sb", keys, **submitted).missing_positions)
        if missing:
            speaker.upload(job.spec.name, "sb", missing, features(job, [keys[p] for p in missing]))
        return job.spec.name

    return prepare


def losses(seed, rows=16, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(rows).astype(dtype)


# Losses


def test_a_softmax_job_chooses_from_embeddings(speaker, prepared):
    answer = speaker.select(prepared({"loss": jobs_pb2.LOSS_SOFTMAX}), "sb", unit_embeddings(16, seed=0))
    assert len(set(answer.positions)) == 4
    assert answer.gain == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_losses_of_single_examples_choose_without_the_reference_model(speaker, dtype):
    fields = {"loss": PER_EXAMPLE, "sampler": jobs_pb2.SAMPLER_TOP_K}
    job = speaker.create_job(reference_model="", policy=policy(**fields))
    submitted = speaker.submit(job.spec.name, "sb", fresh_keys(16))
    assert not submitted.missing_positions
    assert not submitted.HasField("reference")
    mine, theirs = losses(1, dtype=dtype), losses(2, dtype=dtype)
    answer = speaker.select_losses(job.spec.name, "sb", {"learner_loss": mine, "reference_loss": theirs})
    excess = mine.astype(np.float64) - theirs.astype(np.float64)
    assert set(answer.positions) == set(np.argsort(-excess)[:4].tolist())
    assert (answer.reference_inferences, answer.cache_hits, answer.reference_version) == (0, 0, "")


@pytest.mark.parametrize(
    ("scoring", "names"),
    [
        (jobs_pb2.SCORING_HARD_LEARNER, ["learner_loss"]),
        (jobs_pb2.SCORING_EASY_REFERENCE, ["reference_loss"]),
        (jobs_pb2.SCORING_UNIFORM, []),
        (jobs_pb2.SCORING_LEARNABILITY, ["learner_loss", "reference_loss"]),
    ],
)
def test_losses_of_single_examples_come_for_the_models_that_the_scoring_needs(speaker, prepared, scoring, names):
    name = prepared({"loss": PER_EXAMPLE, "scoring": scoring})
    every = {"learner_loss": losses(1), "reference_loss": losses(2)}
    wrong = {key: value for key, value in every.items() if key not in names} or {"learner_loss": losses(1)}
    refusal = refused(speaker.select_losses, name, "sb", wrong | {"other": losses(3)})
    assert (refusal.code, refusal.fields) == (INVALID, ["tensors"])
    assert str(names) in refusal.message
    answer = speaker.select_losses(name, "sb", {key: every[key] for key in names})
    assert len(answer.positions) == 4


@pytest.mark.parametrize(
    ("spoiled", "field"),
    [
        (losses(1, rows=15), "tensors[learner_loss].shape"),
        (losses(1)[:, None], "tensors[learner_loss].shape"),
        (losses(1).astype(np.int32), "tensors[learner_loss].datatype"),
        (np.where(np.arange(16) == 5, np.nan, losses(1)).astype(np.float32), "example_losses"),
    ],
)
def test_losses_of_a_wrong_shape_type_or_value_are_refused(speaker, prepared, spoiled, field):
    name = prepared({"loss": PER_EXAMPLE})
    refusal = refused(speaker.select_losses, name, "sb", {"learner_loss": spoiled, "reference_loss": losses(2)})
    assert (refusal.code, refusal.fields) == (INVALID, [field])
    if field == "example_losses":
        assert "learner_loss" in refusal.message
        assert "row 5" in refusal.message
    good = {"learner_loss": losses(1), "reference_loss": losses(2)}
    assert len(speaker.select_losses(name, "sb", good).positions) == 4


@pytest.mark.parametrize("loss", ["LOSS_SIGMOID", "LOSS_SOFTMAX", "LOSS_PAIRWISE", "LOSS_PER_EXAMPLE"])
def test_outputs_of_another_kind_than_the_loss_wants_are_refused(speaker, prepared, loss):
    name = prepared({"loss": jobs_pb2.Loss.Value(loss), "scoring": jobs_pb2.SCORING_HARD_LEARNER})
    wanted = {"LOSS_PAIRWISE": "pair_losses", "LOSS_PER_EXAMPLE": "example_losses"}.get(loss, "embeddings")
    calls = {
        "embeddings": lambda: speaker.select(name, "sb", unit_embeddings(16, seed=0)),
        "pair_losses": lambda: speaker.select_pairs(name, "sb", {(0, 0): np.ones((16, 16), np.float32)}),
        "example_losses": lambda: speaker.select_losses(name, "sb", {"learner_loss": losses(1)}),
    }
    for kind, call in calls.items():
        if kind != wanted:
            refusal = refused(call)
            assert (refusal.code, refusal.fields) == (INVALID, ["outputs"])
            assert f"outputs is {kind}, expected {wanted}" in refusal.message
    assert "outputs is not set" in refused(speaker.announce, name, "sb", {}).message
    assert len(calls[wanted]().positions) == 4


# Jobs without a reference model


def test_nothing_can_be_uploaded_to_a_job_without_a_reference_model(speaker, prepared):
    job = speaker.create_job(reference_model="", policy=policy(scoring=jobs_pb2.SCORING_HARD_LEARNER))
    keys = fresh_keys(16)
    speaker.submit(job.spec.name, "sb", keys)
    with_one = speaker.create_job()
    refusal = refused(speaker.upload, job.spec.name, "sb", list(range(16)), features(with_one, keys))
    assert (refusal.code, refusal.fields) == (INVALID, ["job"])
    answer = speaker.select(job.spec.name, "sb", unit_embeddings(16, seed=0), return_reference_embeddings=True)
    assert (len(answer.positions), len(answer.reference_embeddings)) == (4, 0)


def test_a_named_reference_model_that_is_not_needed_is_not_waited_for(speaker, prepared):
    name = prepared({"loss": PER_EXAMPLE, "scoring": jobs_pb2.SCORING_LEARNABILITY})
    answer = speaker.select_losses(name, "sb", {"learner_loss": losses(1), "reference_loss": losses(2)})
    assert (answer.reference_inferences, answer.cache_hits) == (0, 0)
    assert answer.fallback == jobs_pb2.FALLBACK_UNSPECIFIED


# Schedules

LINEAR = {"shape": jobs_pb2.Schedule.SHAPE_LINEAR, "steps": 100}


@pytest.mark.parametrize(
    ("step", "gain", "size"), [(0, 0.0, 16), (5, 0.5, 12), (10, 1.0, 8), (60, 2.0, 6), (9999, 3.0, 4)]
)
def test_gain_and_size_of_the_answer_are_those_of_the_step(speaker, prepared, step, gain, size):
    name = prepared(
        {
            "gain_schedule": jobs_pb2.Schedule(start=1, end=3, warmup_steps=10, **LINEAR),
            "filter_ratio_schedule": jobs_pb2.Schedule(start=0.5, end=0.75, warmup_steps=10, **LINEAR),
        },
        step=step,
    )
    answer = speaker.select(name, "sb", unit_embeddings(16, seed=0))
    assert (answer.gain, answer.sub_batch_size, len(answer.positions)) == (gain, size, size)
    assert speaker.select(name, "sb", unit_embeddings(16, seed=0)) == answer


def test_a_submission_has_to_name_the_step(speaker):
    job = speaker.create_job()
    refusal = refused(speaker.submit, job.spec.name, "sb", fresh_keys(16), step=None)
    assert (refusal.code, refusal.fields) == (INVALID, ["step"])
    assert "step is not set, expected the training step" in refusal.message


def test_a_step_at_which_too_little_is_left_is_refused_at_submission(speaker):
    schedule = jobs_pb2.Schedule(start=0.0, end=0.9, **LINEAR)
    job = speaker.create_job(policy=policy(filter_ratio_schedule=schedule))
    speaker.submit(job.spec.name, "early", fresh_keys(16), step=0)
    refusal = refused(speaker.submit, job.spec.name, "late", fresh_keys(16), step=100)
    assert (refusal.code, refusal.fields) == (INVALID, ["example_keys"])
    assert "num_chunks" in refusal.message


def test_the_same_id_at_another_step_is_a_conflict_that_names_both(speaker):
    job = speaker.create_job(policy=policy(gain_schedule=jobs_pb2.Schedule(start=1)), world_size=2)
    keys = [fresh_keys(8), fresh_keys(8)]
    speaker.submit(job.spec.name, "sb", keys[0], rank=0, world_size=2, step=7)
    for rank in range(2):
        refusal = refused(speaker.submit, job.spec.name, "sb", keys[rank], rank=rank, world_size=2, step=8)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "SUPER_BATCH_CONFLICT")
        assert "step 8" in refusal.message
        assert "step 7" in refusal.message
    speaker.submit(job.spec.name, "sb", keys[1], rank=1, world_size=2, step=7)


def test_the_step_of_a_decided_super_batch_cannot_change_either(speaker, prepared):
    keys = fresh_keys(16)
    name = prepared({"gain_schedule": jobs_pb2.Schedule(start=1)}, keys=keys, step=7)
    speaker.select(name, "sb", unit_embeddings(16, seed=0))
    assert speaker.submit(name, "sb", keys, step=7).decided
    assert refused(speaker.submit, name, "sb", keys, step=8).reason == "SUPER_BATCH_CONFLICT"


# Groups


def test_no_group_gives_more_rows_than_the_policy_allows(speaker, prepared):
    labels = ["cat"] * 8 + ["dog"] * 4 + [""] * 4
    name = prepared({"max_per_group": 1, "sub_batch_size": 6}, group_labels=labels)
    answer = speaker.select(name, "sb", unit_embeddings(16, seed=0))
    found = [labels[p] for p in answer.positions]
    assert sorted(found) == ["", "", "", "", "cat", "dog"]


@pytest.mark.parametrize(
    ("labels", "field", "says"),
    [
        ([], "group_labels", "holds 0 labels, expected 16"),
        (["a"] * 15, "group_labels", "holds 15 labels, expected 16"),
        (["a"] * 15 + ["b" * 257], "group_labels[15]", "is 257 bytes long"),
        (["a", "b"] * 8, "group_labels", "allow 2 rows, expected at least the sub-batch (4)"),
    ],
)
def test_impossible_group_labels_are_refused(speaker, labels, field, says):
    job = speaker.create_job(policy=policy(max_per_group=1))
    refusal = refused(speaker.submit, job.spec.name, "sb", fresh_keys(16), group_labels=labels)
    assert (refusal.code, refusal.fields) == (INVALID, [field])
    assert says in refusal.message


def test_group_labels_are_part_of_what_was_submitted_though_nothing_is_limited(speaker):
    job, keys = speaker.create_job(), fresh_keys(16)
    speaker.submit(job.spec.name, "sb", keys, group_labels=["a"] * 16)
    speaker.submit(job.spec.name, "sb", keys, group_labels=["a"] * 16)
    refusal = refused(speaker.submit, job.spec.name, "sb", keys, group_labels=["b"] * 16)
    assert refusal.reason == "SUPER_BATCH_CONFLICT"
    assert refused(speaker.submit, job.spec.name, "other", keys, group_labels=["a"]).fields == ["group_labels"]


def test_a_super_batch_whose_groups_leave_too_little_on_all_ranks_is_dead_lettered(speaker):
    job = speaker.create_job(world_size=2, policy=policy(max_per_group=1, scoring=jobs_pb2.SCORING_HARD_LEARNER))
    name = job.spec.name
    for rank in range(2):
        speaker.submit(name, "sb", fresh_keys(8), rank=rank, world_size=2, group_labels=["same"] * 8)
    calls = [speaker.select(name, "sb", unit_embeddings(8, seed=r), rank=r, world_size=2, wait=False) for r in range(2)]
    for call in calls:
        refusal = refused(call.result)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "DEAD_LETTERED")


# Weights and precision


def test_weights_come_for_every_chosen_row_of_every_rank_and_again(speaker):
    job = speaker.create_job(
        world_size=2, policy=policy(weights=True, sub_batch_size=8, scoring=jobs_pb2.SCORING_HARD_LEARNER)
    )
    name = job.spec.name
    for rank in range(2):
        speaker.submit(name, "sb", fresh_keys(16), rank=rank, world_size=2)

    def call(rank, *, wait):
        return speaker.select(name, "sb", unit_embeddings(16, seed=rank), rank=rank, world_size=2, wait=wait)

    answers = [waiting.result() for waiting in [call(rank, wait=False) for rank in range(2)]]
    assert [len(answer.weights) for answer in answers] == [4, 4]
    together = [weight for answer in answers for weight in answer.weights]
    assert min(together) >= 0
    assert len(set(together)) > 1
    np.testing.assert_allclose(np.mean(together), 1, rtol=1e-6)
    assert [call(rank, wait=True) for rank in range(2)] == answers


def test_weights_are_left_out_unless_they_are_asked_for(speaker, prepared):
    assert not speaker.select(prepared(), "sb", unit_embeddings(16, seed=0)).weights


def test_bfloat16_products_choose_as_well(speaker, prepared):
    name = prepared({"precision": jobs_pb2.PRECISION_BFLOAT16})
    assert len(speaker.select(name, "sb", unit_embeddings(16, seed=0)).positions) == 4


@pytest.mark.parametrize("loss", ["LOSS_SIGMOID", "LOSS_SOFTMAX", "LOSS_PAIRWISE"])
@pytest.mark.parametrize("fallback", [jobs_pb2.FALLBACK_UNIFORM, jobs_pb2.FALLBACK_HARD_LEARNER])
def test_a_fallback_is_declared_for_any_loss(speaker, loss, fallback):
    job = speaker.create_job(policy=policy(loss=jobs_pb2.Loss.Value(loss), weights=True), fallback=fallback)
    stored = speaker.jobs.GetJob(jobs_pb2.GetJobRequest(name=job.spec.name), timeout=TIMEOUT_S).job
    assert stored.spec.fallback == fallback


def test_learner_outputs_are_not_needed_twice_when_the_decision_is_there(speaker, prepared):
    name = prepared({"loss": PER_EXAMPLE})
    given = {"learner_loss": losses(1), "reference_loss": losses(2)}
    first = speaker.select_losses(name, "sb", given)
    assert speaker.select_losses(name, "sb", given, spoil=lambda messages: messages[:1]) == first
    other = {"learner_loss": losses(3), "reference_loss": losses(2)}
    assert speaker.select_losses(name, "sb", other) == first
    assert isinstance(first, selection_pb2.SelectSubBatchResponse)
