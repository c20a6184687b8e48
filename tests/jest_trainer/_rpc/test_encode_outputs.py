from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import jest_trainer as jest
from jest_trainer._rpc.encode_outputs import encode_outputs
from jest_wire.tensors import Assembler, as_torch


def policy(loss, scoring="learnability"):
    return jest.SelectionPolicy(loss=loss, scoring=scoring, sub_batch_size=1, num_chunks=1)


def received(encoded):
    """What a server makes of it: tensors by name, in order, checksums compared."""
    specs = encoded.header.tensors
    assembler = Assembler(specs, max_bytes=1 << 30)
    for chunk in encoded.chunks():
        assembler.add(chunk)
    return {spec.name: as_torch(spec, data) for spec, data in zip(specs, assembler.finish(), strict=True)}


def put_together(encoded, shape):
    matrix = torch.full(shape, float("nan"))
    tensors = list(received(encoded).values())
    for at, tile in zip(encoded.header.pair_losses.tiles, tensors, strict=True):
        rows, columns = slice(at.row, at.row + tile.shape[0]), slice(at.column, at.column + tile.shape[1])
        assert matrix[rows, columns].isnan().all(), "tiles overlap"
        matrix[rows, columns] = tile.float()
    return matrix


# Pair losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pair_losses_arrive_tile_by_tile_in_their_type(dtype):
    values = torch.randn(600, 900, generator=torch.Generator().manual_seed(0)).to(dtype)
    encoded = encode_outputs(jest.PairLosses(values), policy("pairwise"))
    assert len(encoded.header.tensors) > 1
    assert {tensor.dtype for tensor in received(encoded).values()} == {dtype}
    assert put_together(encoded, values.shape).equal(values.float())


def test_pair_losses_in_float64_travel_as_float32():
    values = torch.rand(3, 4, dtype=torch.float64)
    encoded = encode_outputs(jest.PairLosses(values), policy("pairwise"))
    assert {spec.datatype for spec in encoded.header.tensors} == {"FP32"}
    assert put_together(encoded, (3, 4)).equal(values.float())


def test_pair_losses_need_not_be_contiguous():
    values = torch.rand(900, 600).T
    assert put_together(encode_outputs(jest.PairLosses(values), policy("pairwise")), values.shape).equal(values)


def test_pair_losses_may_carry_a_gradient():
    values = torch.rand(2, 2, requires_grad=True)
    assert put_together(encode_outputs(jest.PairLosses(values), policy("pairwise")), (2, 2)).equal(values.detach())


def test_pair_losses_are_sent_without_a_copy_of_the_whole():
    program = (
        "import resource, torch, jest_trainer as jest\n"
        "from jest_trainer._rpc.encode_outputs import encode_outputs\n"
        "peak_kib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "policy = jest.SelectionPolicy(loss='pairwise', sub_batch_size=16)\n"
        "encode_outputs(jest.PairLosses(torch.ones(700, 700)), policy)\n"
        "before = peak_kib()\n"
        "values = torch.arange(4096.0).expand(1 << 15, 4096)\n"  # 512 MiB, if it were not one row all over
        "sent = sum(len(chunk.data) for chunk in encode_outputs(jest.PairLosses(values), policy).chunks())\n"
        "print(sent >> 20, (peak_kib() - before) >> 10)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    sent_mib, grown_mib = map(int, run.stdout.split())
    assert sent_mib == 512
    assert grown_mib < 64


def test_a_loss_that_is_no_number_is_named_by_its_place_in_the_matrix():
    values = torch.zeros(600, 900)
    values[431, 17] = float("nan")
    with pytest.raises(ValueError, match=r"pair losses must be finite .*torch.float32: row 431, column 17 holds NaN"):
        encode_outputs(jest.PairLosses(values), policy("pairwise"))


def test_a_loss_too_large_for_the_wire_type_is_refused():
    with pytest.raises(ValueError, match=r"finite in the wire type torch.float16: row 0, column 1"):
        encode_outputs(jest.PairLosses(torch.tensor([[0.0, 1e6], [0.0, 0.0]])), policy("pairwise"), "fp16")


def test_chunks_can_be_made_again_for_another_attempt():
    encoded = encode_outputs(jest.PairLosses(torch.rand(600, 900)), policy("pairwise"))
    assert list(encoded.chunks()) == list(encoded.chunks())


# Losses of single examples


@pytest.mark.parametrize(
    ("scoring", "names"),
    [
        ("learnability", ["learner_loss", "reference_loss"]),
        ("hard_learner", ["learner_loss"]),
        ("easy_reference", ["reference_loss"]),
        ("uniform", []),
    ],
)
def test_only_the_losses_that_the_scoring_needs_are_sent(scoring, names):
    losses = jest.ExampleLosses(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0], dtype=torch.float64))
    encoded = encode_outputs(losses, policy("per_example", scoring))
    assert encoded.header.WhichOneof("outputs") == "example_losses"
    expected = {"learner_loss": [1.0, 2.0], "reference_loss": [3.0, 4.0]}
    assert {name: tensor.tolist() for name, tensor in received(encoded).items()} == {n: expected[n] for n in names}


def test_an_example_loss_too_large_for_the_wire_type_is_refused():
    with pytest.raises(ValueError, match="learner must be finite: row 1"):
        encode_outputs(jest.ExampleLosses(torch.tensor([1.0, 1e6])), policy("per_example", "hard_learner"), "fp16")


# Embeddings


def unit(dtype=torch.float32):
    return torch.tensor([[0.6, 0.8], [1.0, 0.0]], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_as_is_leaves_the_element_type_alone(dtype):
    encoded = encode_outputs(jest.Embeddings(unit(dtype), unit(dtype), scale=3.0, bias=1.0), policy("softmax"))
    assert {tensor.dtype for tensor in received(encoded).values()} == {dtype}


@pytest.mark.parametrize(("wire_dtype", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_wire_type_rounds_the_vectors_and_keeps_scale_and_bias(wire_dtype, dtype):
    encoded = encode_outputs(jest.Embeddings(unit(), -unit(), scale=3.0, bias=1.0), policy("sigmoid"), wire_dtype)
    tensors = received(encoded)
    assert tensors["image_embedding"].equal(unit().to(dtype))
    assert tensors["text_embedding"].equal(-unit().to(dtype))
    assert (encoded.header.embeddings.scale, encoded.header.embeddings.bias) == (3.0, 1.0)


def test_vectors_too_large_for_the_wire_type_are_refused():
    with pytest.raises(ValueError, match="image must be finite"):
        encode_outputs(jest.Embeddings(unit() * 1e5, unit(), scale=1.0), policy("sigmoid"), "fp16")
