import pytest
import torch

from jest_core import Embeddings, SelectionPolicy, conditional_logits, select_sub_batch
from jest_core_samples import random_embeddings

TEN = random_embeddings(10, seed=0)
POLICY = SelectionPolicy(sub_batch_size=4, num_chunks=2)


@pytest.mark.parametrize(
    ("scoring", "learner", "reference", "message"),
    [
        ("learnability", None, TEN, "learner is None, but scoring 'learnability' needs its embeddings"),
        ("learnability", TEN, None, "reference is None, but scoring 'learnability' needs"),
        ("easy_reference", TEN, None, "reference is None, but scoring 'easy_reference' needs"),
        ("hard_learner", None, TEN, "learner is None, but scoring 'hard_learner' needs"),
        ("uniform", None, None, "super_batch_size must be given when there are no embeddings"),
    ],
)
def test_embeddings_that_the_scoring_needs_must_be_given(scoring, learner, reference, message):
    policy = SelectionPolicy(scoring=scoring, sub_batch_size=4, num_chunks=2)
    with pytest.raises(ValueError, match=message):
        select_sub_batch(learner, reference, policy, seed=0)
    with pytest.raises(ValueError, match=message):
        conditional_logits(learner, reference, policy, [])


def test_learner_and_reference_must_have_the_same_rows():
    with pytest.raises(ValueError, match=r"the same everywhere: learner \(10\), reference \(9\)"):
        select_sub_batch(TEN, random_embeddings(9, seed=0), POLICY, seed=0)


def test_a_super_batch_size_must_agree_with_the_embeddings():
    with pytest.raises(ValueError, match=r"learner \(10\), reference \(10\), super_batch_size \(11\)"):
        select_sub_batch(TEN, TEN, POLICY, seed=0, super_batch_size=11)


@pytest.mark.parametrize("size", [0, -3, 2.0, True])
def test_a_super_batch_size_must_be_a_positive_integer(size):
    policy = SelectionPolicy(scoring="uniform", sub_batch_size=4, num_chunks=2)
    with pytest.raises(ValueError, match=r"super_batch_size \(.*\) must be an integer of at least 1"):
        conditional_logits(None, None, policy, [], super_batch_size=size)


def test_models_must_be_on_one_device():
    elsewhere = object.__new__(Embeddings)
    for name, value in (("image", TEN.image.to("meta")), ("text", TEN.text.to("meta")), ("scale", 1.0), ("bias", 0.0)):
        object.__setattr__(elsewhere, name, value)
    with pytest.raises(ValueError, match="learner and reference must be on one device, not on cpu and meta"):
        select_sub_batch(TEN, elsewhere, POLICY, seed=0)


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, None, True])
def test_a_seed_outside_64_bits_is_an_error(seed):
    with pytest.raises(ValueError, match=r"seed \(.*\) must be an integer from 0 to 2\*\*64 - 1"):
        select_sub_batch(TEN, TEN, POLICY, seed=seed)


def test_a_sub_batch_larger_than_the_super_batch_is_an_error():
    policy = SelectionPolicy(sub_batch_size=11, num_chunks=1)
    with pytest.raises(ValueError, match=r"sub_batch_size \(11\) is larger than the super-batch \(10\)"):
        select_sub_batch(TEN, TEN, policy, seed=0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["a"] * 9, "example_keys has 9 keys for a super-batch of 10 rows"),
        ("abcdefghij", "example_keys must hold one key for each row, not be a single string"),
        ([["a"]] * 10, "example_keys must be hashable: unhashable type: 'list'"),
        (torch.zeros(9, dtype=torch.int64), r"example_keys must be int64 of shape \[10\], .* of shape \[9\]"),
        (torch.zeros(10), r"example_keys must be int64 of shape \[10\], not torch.float32"),
        (["a", "b", "c"] * 3 + ["a"], r"\(10 rows\) has 3 distinct example keys, fewer than the sub-batch \(4\)"),
    ],
)
def test_example_keys_must_name_every_row_and_enough_examples(keys, message):
    with pytest.raises(ValueError, match=message):
        select_sub_batch(TEN, TEN, POLICY, seed=0, example_keys=keys)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (torch.zeros(9, dtype=torch.int64), r"rank_of_row must be int64 of shape \[10\], .* of shape \[9\]"),
        (torch.zeros(10, dtype=torch.int32), r"rank_of_row must be int64 of shape \[10\], not torch.int32"),
        ([0] * 10, "rank_of_row must be a tensor, not list"),
        (torch.arange(10) % 2 + 1, r"rank_of_row must hold every rank from 0 to W - 1, not \[1, 2\]"),
        (torch.arange(10) % 2 * 2, r"rank_of_row must hold every rank from 0 to W - 1, not \[0, 2\]"),
        (torch.arange(10) - 1, r"rank_of_row must hold .* not \[-1, 0, 1, 2, 3, 4, 5, 6, ...\]"),
        (torch.arange(10) % 3, r"sub-batch \(4\) must be divisible by the number of ranks \(3\) .* choose 3 or 6"),
        (torch.tensor([0] * 9 + [1]), "rank 1 has 1 distinct example keys to choose from, but needs 2"),
    ],
)
def test_ranks_must_cover_every_row_and_be_able_to_give_their_share(ranks, message):
    with pytest.raises(ValueError, match=message):
        select_sub_batch(TEN, TEN, POLICY, seed=0, rank_of_row=ranks)


def test_ranks_that_bring_the_same_rows_are_named_as_the_cause_of_too_few_examples():
    policy = SelectionPolicy(sub_batch_size=6, num_chunks=1, placement="global")
    ranks, keys = torch.arange(10) // 5, list(range(5)) * 2
    with pytest.raises(
        ValueError, match=r"fewer than the sub-batch \(6\); if all 2 ranks load the same rows, .*DistributedSampler"
    ):
        select_sub_batch(TEN, TEN, policy, seed=0, rank_of_row=ranks, example_keys=keys)
    with pytest.raises(ValueError, match=r"fewer than the sub-batch \(6\)$"):
        select_sub_batch(TEN, TEN, policy, seed=0, example_keys=keys)


def test_logits_that_overflow_are_an_error():
    huge = random_embeddings(10, seed=0, scale=3e38, bias=3e38)
    policy = SelectionPolicy(scoring="hard_learner", sub_batch_size=4, num_chunks=2, sampler="top_k")
    with pytest.raises(ValueError, match="logits overflow float32"):
        select_sub_batch(huge, None, policy, seed=0)
