import numpy as np
import pytest
import torch
from torch.nn import functional

from jest_core import Embeddings, ExampleLosses, SelectionPolicy, select_sub_batch, selection_seed
from jest_server.domain.decisions import Decision
from jest_server.domain.policies import PolicySpec, ScheduleSpec
from jest_server.domain.references import ReferenceInfo
from jest_server.domain.super_batches import Submission
from jest_server.selector.decide.selection import SelectionTask, effective_policy, replay, select
from jest_server.selector.learner_outputs.pending_selections import LearnerOutputs, LossesOfModels
from jest_server.selector.learner_outputs.spilled_matrix import SpilledMatrix
from jest_wire.learner_outputs import Tile

CPU = torch.device("cpu")
REFERENCE = ReferenceInfo(
    name="ref", version="1", preprocessing_id="p", scale=20.0, bias=-4.0, embedding_width=12, inputs=()
)
SEED = selection_seed(5, 0)


def unit(*shape, seed):
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def policy(**fields):
    return PolicySpec(**{"sub_batch_size": 8, "num_chunks": 2} | fields)


def submissions(rows, *, keys=None, labels=None):
    names = keys or {rank: [f"{rank}-{row}" for row in range(n)] for rank, n in enumerate(rows)}
    return {
        rank: Submission(
            job="j",
            super_batch_id="sb",
            rank=rank,
            world_size=len(rows),
            step=0,
            reference=REFERENCE,
            keys=tuple(names[rank]),
            digest=str(rank),
            group_labels=tuple(labels[rank]) if labels else (),
        )
        for rank in range(len(rows))
    }


def embeddings(rows):
    return {
        rank: LearnerOutputs(Embeddings(unit(n, 6, seed=rank), unit(n, 6, seed=50 + rank), 10.0, -10.0), str(rank))
        for rank, n in enumerate(rows)
    }


def inputs(rows, *, outputs=None, reference=True, **fields):
    """What ranks with so many rows each brought, and the joined reference."""
    joined = (REFERENCE, unit(2, sum(rows), 12, seed=99).half()) if reference else None
    return {"submissions": submissions(rows, **fields), "outputs": outputs or embeddings(rows), "reference": joined}


def chosen_from(spec, given, *, step=0, seed=SEED):
    return select(SelectionTask(spec, seed, step, **given), CPU)


def models_of(given):
    """The learner's and the reference's embeddings of all rows, joined apart from the code under test."""
    parts = [outputs.outputs for outputs in given["outputs"].values()]
    learner = Embeddings(torch.cat([p.image for p in parts]), torch.cat([p.text for p in parts]), 10.0, -10.0)
    joined = given["reference"][1]
    return learner, Embeddings(joined[0], joined[1], scale=20.0, bias=-4.0)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_several_ranks_choose_what_one_process_with_all_rows_would(loss):
    given = inputs([20, 24])
    chosen = chosen_from(policy(loss=loss), given)
    expected = select_sub_batch(
        *models_of(given),
        SelectionPolicy(sub_batch_size=8, num_chunks=2, loss=loss),
        seed=SEED,
        rank_of_row=torch.tensor([0] * 20 + [1] * 24),
    )
    together = [p for p in expected.positions.tolist() if p < 20], [p for p in expected.positions.tolist() if p >= 20]
    assert chosen.positions == {0: tuple(together[0]), 1: tuple(p - 20 for p in together[1])}
    assert chosen.perplexity == expected.perplexity
    assert (chosen.gain, chosen.weights) == (1.0, None)


def test_the_same_arguments_give_the_same_choice_and_another_step_another():
    given = inputs([40])
    first = chosen_from(policy(), given)
    assert chosen_from(policy(), given) == first
    assert chosen_from(policy(), given, seed=selection_seed(5, 1)).positions != first.positions


@pytest.mark.parametrize("fallback", ["uniform", "hard_learner"])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_without_the_reference_the_fallback_chooses(fallback, loss):
    given = inputs([40], reference=False)
    chosen = chosen_from(effective_policy(policy(loss=loss, weights=True), fallback), given)
    assert chosen == chosen_from(policy(loss=loss, scoring=fallback, weights=True), given)
    assert (set(chosen.weights[0]) == {1.0}) == (fallback == "uniform")


def test_global_placement_may_give_ranks_unequal_shares_that_add_up():
    chosen = chosen_from(policy(placement="global"), inputs([20, 24]))
    assert sum(map(len, chosen.positions.values())) == chosen.sub_batch_size == 8


def test_equal_keys_on_two_ranks_are_chosen_once():
    keys = {rank: [f"key-{row}" for row in range(10)] for rank in range(2)}
    chosen = chosen_from(policy(), inputs([10, 10], keys=keys))
    names = [keys[rank][p] for rank, positions in chosen.positions.items() for p in positions]
    assert len(names) == len(set(names)) == 8


def test_too_few_distinct_keys_cannot_be_chosen_from():
    with pytest.raises(ValueError, match="8"):
        chosen_from(policy(), inputs([10], keys={0: ["same"] * 10}))


def test_no_group_gives_more_rows_than_it_may_and_rows_without_one_are_free():
    labels = {0: ["cat"] * 10 + [""] * 10, 1: ["cat"] * 20}
    chosen = chosen_from(policy(max_per_group=2, placement="global"), inputs([20, 20], labels=labels))
    found = [labels[rank][p] for rank, positions in chosen.positions.items() for p in positions]
    assert found.count("cat") <= 2
    assert len(found) == 8


def test_weights_are_split_by_rank_in_the_order_of_the_positions():
    given = inputs([20, 24])
    chosen = chosen_from(policy(weights=True), given)
    expected = select_sub_batch(
        *models_of(given),
        SelectionPolicy(sub_batch_size=8, num_chunks=2, weights=True),
        seed=SEED,
        rank_of_row=torch.tensor([0] * 20 + [1] * 24),
    )
    weight_of = dict(zip(expected.positions.tolist(), expected.weights.tolist(), strict=True))
    for rank, offset in ((0, 0), (1, 20)):
        assert list(chosen.weights[rank]) == [weight_of[p + offset] for p in chosen.positions[rank]]
    np.testing.assert_allclose(np.mean([w for weights in chosen.weights.values() for w in weights]), 1, rtol=1e-6)


def example_losses(rows, *, learner=True, reference=True):
    def losses(given, seed, n):
        return ExampleLosses(torch.randn(n, generator=torch.Generator().manual_seed(seed))) if given else None

    return {
        rank: LearnerOutputs(LossesOfModels(losses(learner, rank, n), losses(reference, 70 + rank, n)), str(rank))
        for rank, n in enumerate(rows)
    }


def test_losses_of_single_examples_choose_the_rows_whose_learner_loss_is_furthest_above_the_references():
    outputs = example_losses([20, 24])
    spec = policy(loss="per_example", sampler="top_k", placement="global")
    chosen = chosen_from(spec, inputs([20, 24], outputs=outputs, reference=False))
    excess = torch.cat([outputs[r].outputs.learner.values - outputs[r].outputs.reference.values for r in range(2)])
    best = set(torch.topk(excess, 8).indices.tolist())
    assert {p + (0, 20)[rank] for rank, positions in chosen.positions.items() for p in positions} == best


@pytest.mark.parametrize(
    ("scoring", "given"), [("hard_learner", {"reference": False}), ("easy_reference", {"learner": False})]
)
def test_losses_of_single_examples_are_needed_of_the_models_that_count_alone(scoring, given):
    outputs = example_losses([20], **given)
    chosen = chosen_from(policy(loss="per_example", scoring=scoring), inputs([20], outputs=outputs, reference=False))
    assert len(chosen.positions[0]) == 8


@pytest.fixture
def pair_outputs(tmp_path):
    """Two ranks' sigmoid losses of their embeddings as pair losses, in a spilled matrix."""
    learner, _ = models_of(inputs([20, 24]))
    logits = 10.0 * learner.image @ learner.text.T - 10.0
    losses = functional.softplus(logits * (1 - 2 * torch.eye(44)))
    matrix = SpilledMatrix(44, "FP32")
    matrix.open(tmp_path)
    matrix.write(Tile(0, 0, 44, 44), losses)
    yield {rank: LearnerOutputs(matrix, str(rank)) for rank in range(2)}
    matrix.close()


@pytest.mark.parametrize("scoring", ["learnability", "hard_learner", "uniform"])
def test_pair_losses_of_the_sigmoid_loss_choose_what_its_embeddings_choose(pair_outputs, scoring):
    by_pairs = chosen_from(policy(loss="pairwise", scoring=scoring), inputs([20, 24], outputs=pair_outputs))
    by_embeddings = chosen_from(policy(scoring=scoring), inputs([20, 24]))
    assert by_pairs.positions == by_embeddings.positions


SCHEDULED = PolicySpec(
    filter_ratio_schedule=ScheduleSpec(shape="linear", start=0.5, end=0.75, steps=100),
    gain_schedule=ScheduleSpec(shape="cosine", start=0.1, end=2.0, steps=100, warmup_steps=10),
    num_chunks=4,
    weights=True,
)


def test_a_schedule_sets_gain_and_size_of_each_step():
    given = inputs([40])
    first, last = (chosen_from(SCHEDULED, given, step=step) for step in (0, 1000))
    assert (first.gain, first.sub_batch_size) == (0.0, 20)
    assert (last.gain, last.sub_batch_size) == (2.0, 10)


def test_a_step_at_which_too_little_is_left_cannot_be_chosen_from():
    spec = SCHEDULED.model_copy(update={"num_chunks": 16})
    with pytest.raises(ValueError, match="num_chunks"):
        chosen_from(spec, inputs([40]), step=100)


@pytest.mark.parametrize("fallback", [None, "hard_learner"])
def test_a_recorded_decision_of_a_scheduled_job_is_computed_again_from_its_record(fallback):
    given = inputs([20, 24], reference=fallback is None)
    chosen = chosen_from(effective_policy(SCHEDULED, fallback), given, step=60)
    decision = Decision(
        job="j",
        super_batch_id="sb",
        policy=SCHEDULED,
        seed=SEED,
        step=60,
        reference=REFERENCE,
        learner_digests={0: "0", 1: "1"},
        submission_digests={0: "0", 1: "1"},
        positions=chosen.positions,
        weights=chosen.weights,
        gain=chosen.gain,
        sub_batch_size=chosen.sub_batch_size,
        super_batch_size=44,
        perplexity=chosen.perplexity,
        cache_hits=0,
        reference_inferences=0,
        fallback=fallback,
        fallback_reason="",
        timings_s={},
        decided_at_s=1.0,
    )
    recorded = Decision.model_validate_json(decision.model_dump_json())
    again = replay(recorded, **given, device=CPU)
    assert (again.positions, again.weights) == (recorded.positions, recorded.weights)
    assert (again.gain, again.sub_batch_size, again.perplexity) == (
        recorded.gain,
        recorded.sub_batch_size,
        recorded.perplexity,
    )


def test_the_work_grows_with_rows_chosen_rows_and_the_widths_that_count():
    given = inputs([40])
    assert SelectionTask(policy(), SEED, 0, **given).cost() == 40 * 8 * (6 + 12)
    assert SelectionTask(policy(scoring="hard_learner"), SEED, 0, **given).cost() == 40 * 8 * 6
    assert SelectionTask(policy(scoring="uniform"), SEED, 0, **given).cost() == 40 * 8
    assert SelectionTask(SCHEDULED, SEED, 0, **given).cost() == 40 * 20 * (6 + 12)
