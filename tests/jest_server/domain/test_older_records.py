"""Records outlive the version that wrote them."""

from jest_server.domain.decisions import Decision
from jest_server.domain.jobs import JobSpec
from jest_server.domain.policies import PolicySpec
from jest_server.domain.super_batches import Submission

OLD_POLICY = (
    '{"scoring":"learnability","loss":"sigmoid","sub_batch_size":null,"filter_ratio":"0.8","num_chunks":16,'
    '"gain":2.5,"normalization":"sum","sampler":"gumbel","placement":"per_rank"}'
)
REFERENCE = '{"name":"r","version":"1","preprocessing_id":"p","scale":1.0,"bias":0.0,"embedding_width":2,"inputs":[]}'


def test_a_job_that_was_recorded_before_schedules_and_limits_is_still_read():
    spec = JobSpec.model_validate_json(f'{{"name":"j","reference_model":"r","policy":{OLD_POLICY}}}')
    assert spec.policy == PolicySpec(filter_ratio="0.8", gain=2.5)
    assert spec.policy.gain_schedule is spec.policy.max_per_group is None
    assert (spec.policy.weights, spec.policy.precision) == (False, "float32")


def test_a_submission_that_was_recorded_before_labels_is_still_read():
    old = (
        '{"job":"j","super_batch_id":"sb","rank":0,"world_size":1,"step":3,"keys":["a"],"digest":"d",'
        f'"reference":{REFERENCE}}}'
    )
    submission = Submission.model_validate_json(old)
    assert (submission.step, submission.group_labels) == (3, ())


def test_a_decision_that_was_recorded_before_weights_is_still_read():
    old = (
        f'{{"job":"j","super_batch_id":"sb","policy":{OLD_POLICY},"seed":1,"step":3,"reference":{REFERENCE},'
        '"learner_digests":{"0":"l"},"submission_digests":{"0":"d"},"positions":{"0":[2,1]},"sub_batch_size":2,'
        '"super_batch_size":10,"perplexity":[3.0],"cache_hits":0,"reference_inferences":10,"fallback":null,'
        '"fallback_reason":"","timings_s":{},"decided_at_s":1.0}'
    )
    decision = Decision.model_validate_json(old)
    assert decision.positions == {0: (2, 1)}
    assert decision.gain is decision.weights is None
