from __future__ import annotations

import pytest
import torch

import jest_core
import jest_trainer as jest
from jest_trainer.outputs import check_outputs

EMBEDDINGS = jest.Embeddings(torch.eye(2), torch.eye(2), scale=1.0)
PAIRS = jest.PairLosses(torch.ones(2, 2))
EXAMPLES = jest.ExampleLosses(torch.ones(2), torch.ones(2))


def policy(loss, scoring="learnability"):
    return jest.SelectionPolicy(loss=loss, scoring=scoring, sub_batch_size=1, num_chunks=1)


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [("sigmoid", EMBEDDINGS), ("softmax", EMBEDDINGS), ("pairwise", PAIRS), ("per_example", EXAMPLES)],
)
def test_each_loss_takes_its_own_kind(loss, outputs):
    assert check_outputs("outputs", outputs, policy(loss), world_size=1) is outputs


@pytest.mark.parametrize(
    ("loss", "outputs", "message"),
    [
        ("sigmoid", PAIRS, "must be jest_trainer.Embeddings, not jest_trainer.PairLosses: the job's loss is 'sigmoid'"),
        ("softmax", EXAMPLES, "must be jest_trainer.Embeddings, not jest_trainer.ExampleLosses: .* 'softmax'"),
        ("pairwise", EMBEDDINGS, "must be jest_trainer.PairLosses, not jest_core.Embeddings: .* 'pairwise'"),
        (
            "pairwise",
            jest_core.PairLosses(torch.ones(2, 2)),
            "must be jest_trainer.PairLosses, not jest_core.PairLosses",
        ),
        ("per_example", torch.ones(2), "must be jest_trainer.ExampleLosses, not torch.Tensor: .* 'per_example'"),
        ("sigmoid", (1, 2), "must be jest_trainer.Embeddings, not tuple: .* 'sigmoid'"),
        ("sigmoid", None, "must be jest_trainer.Embeddings, not NoneType"),
    ],
)
def test_another_kind_is_refused_by_loss_by_what_came_and_by_what_was_expected(loss, outputs, message):
    with pytest.raises(ValueError, match="outputs " + message):
        check_outputs("outputs", outputs, policy(loss), world_size=1)


@pytest.mark.parametrize(
    ("scoring", "learner", "reference", "lacking"),
    [
        ("learnability", None, torch.ones(2), "learner"),
        ("learnability", torch.ones(2), None, "reference"),
        ("hard_learner", None, torch.ones(2), "learner"),
        ("easy_reference", torch.ones(2), None, "reference"),
    ],
)
def test_losses_that_the_scoring_needs_have_to_be_there(scoring, learner, reference, lacking):
    with pytest.raises(ValueError, match=f"outputs has no {lacking} losses, but scoring '{scoring}' under loss"):
        check_outputs("outputs", jest.ExampleLosses(learner, reference), policy("per_example", scoring), world_size=1)


@pytest.mark.parametrize("outputs", [(1, 2, 3), {"image_features": 1}])
def test_a_model_s_own_outputs_are_refused_with_the_way_to_convert_them(outputs):
    with pytest.raises(ValueError, match=r"the job's loss is 'sigmoid'; make it with Embeddings.from_outputs\("):
        check_outputs("outputs", outputs, policy("sigmoid"), world_size=1)


def test_uniform_choice_needs_no_losses_at_all():
    nothing = jest.ExampleLosses()
    assert check_outputs("outputs", nothing, policy("per_example", "uniform"), world_size=1) is nothing


def test_a_single_rank_s_pair_losses_are_square():
    with pytest.raises(ValueError, match=r"outputs has shape \[2, 3\], expected one column for each of .* 2 rows"):
        check_outputs("outputs", jest.PairLosses(torch.ones(2, 3)), policy("pairwise"), world_size=1)


def test_a_rank_among_others_has_a_column_for_each_row_of_all():
    wide = jest.PairLosses(torch.ones(2, 5))
    assert check_outputs("outputs", wide, policy("pairwise"), world_size=2) is wide


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_losses_may_have_any_float_type(dtype):
    assert len(jest.PairLosses(torch.ones(2, 3, dtype=dtype))) == 2
    assert jest.ExampleLosses(torch.ones(2, dtype=dtype)).learner.dtype == dtype


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0]], "values must be a tensor, not list"),
        (torch.ones(3), r"values must be a matrix \[rows, B\] of float32.*not torch.float32 of shape \[3\]"),
        (torch.ones(2, 2, dtype=torch.int64), "not torch.int64 of shape"),
        (torch.ones(0, 4), r"values has shape \[0, 4\], expected at least one row"),
        (torch.ones(4, 0), r"values has shape \[4, 0\], expected at least one row and one column"),
    ],
)
def test_what_pair_losses_cannot_be_made_of_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        jest.PairLosses(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learner": [1.0]}, "learner must be a tensor, not list"),
        ({"reference": torch.ones(2, 1)}, r"reference must be a vector \[rows\]"),
        ({"learner": torch.ones(2).int()}, "not torch.int32"),
        ({"learner": torch.tensor([0.0, 1.0, float("nan")])}, "learner must be finite: row 2 holds NaN or Inf"),
        ({"reference": torch.tensor([float("inf")])}, "reference must be finite: row 0"),
        ({"learner": torch.ones(2), "reference": torch.ones(3)}, "learner has 2 rows and reference 3, expected equal"),
    ],
)
def test_what_example_losses_cannot_be_made_of_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        jest.ExampleLosses(**arguments)
