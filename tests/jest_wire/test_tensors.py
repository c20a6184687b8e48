from __future__ import annotations

import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from jest_proto.v1 import tensors_pb2 as pb
from jest_wire import tensors as codec
from jest_wire.tensors import Assembler, TensorChecksumError, TensorError, TensorStream, TensorTooLargeError

MIB = 1 << 20
NO_LIMIT = 1 << 40

shapes = st.lists(st.integers(0, 5), min_size=1, max_size=3)
datatypes = st.sampled_from(sorted(codec.DATATYPES))


def raw_array(datatype, shape, seed):
    """Any bit pattern at all, NaN and infinities included: the codec carries bits, not numbers."""
    row = codec.DATATYPES[datatype]
    raw = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * row.numpy.itemsize, np.uint8)
    return raw, raw.view(row.numpy).reshape(shape)


def received(specs, pieces, max_bytes=NO_LIMIT):
    assembler = Assembler(specs, max_bytes=max_bytes)
    for piece in pieces:
        assembler.add(piece)
    return assembler.finish()


def float_spec(**changes):
    fields = {"name": "x", "datatype": "FP32", "shape": [2, 3], "byte_length": 24} | changes
    return pb.TensorSpec(**fields)


@pytest.fixture
def sent():
    """A tensor of two and a half chunks, one of a single chunk."""
    rng = np.random.default_rng(1)
    arrays = {"big": rng.integers(0, 256, (5, MIB // 2), np.uint8), "small": rng.integers(0, 9, (5,), np.int64)}
    specs, buffers = codec.encode(arrays)
    return arrays, specs, list(codec.chunks(buffers))


# Round trips


@given(datatype=datatypes, shape=shapes, seed=st.integers(0, 9))
def test_a_numpy_array_of_any_datatype_comes_back_bit_by_bit(datatype, shape, seed):
    raw, array = raw_array(datatype, shape, seed)
    specs, buffers = codec.encode({"x": array})
    (data,) = received(specs, codec.chunks(buffers))
    back = codec.as_numpy(specs[0], data)
    assert (back.dtype, back.shape) == (array.dtype, tuple(shape))
    assert back.tobytes() == raw.tobytes()


@given(datatype=datatypes, shape=shapes.filter(math.prod), seed=st.integers(0, 9))
def test_a_torch_tensor_of_any_datatype_comes_back_bit_by_bit(datatype, shape, seed):
    raw, _ = raw_array(datatype, shape, seed)
    dtype = getattr(torch, codec.DATATYPES[datatype].torch)
    specs, buffers = codec.encode({"x": torch.from_numpy(raw).view(dtype).reshape(shape)})
    (data,) = received(specs, codec.chunks(buffers))
    back = codec.as_torch(specs[0], data)
    assert (back.dtype, tuple(back.shape)) == (dtype, tuple(shape))
    assert back.view(torch.uint8).numpy().tobytes() == raw.tobytes()


@given(datatype=datatypes, seed=st.integers(0, 9))
def test_torch_and_numpy_are_announced_and_sent_alike(datatype, seed):
    raw, array = raw_array(datatype, (3, 4), seed)
    tensor = torch.from_numpy(raw.copy()).view(getattr(torch, codec.DATATYPES[datatype].torch)).reshape(3, 4)
    from_numpy, from_torch = codec.encode({"x": array}), codec.encode({"x": tensor})
    assert from_numpy[0] == from_torch[0]
    assert from_numpy[1][0].tobytes() == from_torch[1][0].tobytes()


@settings(max_examples=25)
@given(st.lists(st.tuples(datatypes, shapes), max_size=5))
def test_many_tensors_in_one_stream_keep_their_order_and_content(described):
    arrays = {f"t{i}": raw_array(datatype, shape, i)[1] for i, (datatype, shape) in enumerate(described)}
    specs, buffers = codec.encode(arrays)
    backs = received(specs, codec.chunks(buffers))
    assert [spec.name for spec in specs] == list(arrays)
    assert [back.tobytes() for back in backs] == [array.tobytes() for array in arrays.values()]


def test_bf16_values_survive_from_torch_to_numpy():
    values = torch.tensor([[1.0, -2.5, 3.140625]], dtype=torch.bfloat16)
    specs, buffers = codec.encode({"x": values})
    back = codec.as_numpy(specs[0], buffers[0])
    assert back.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(back.astype(np.float64), values.double().numpy())


def test_zero_rows_need_no_chunks():
    arrays = {"none": np.empty((0, 7), np.float32), "one": np.ones((1,), np.int32), "again": np.empty((0,), np.uint8)}
    specs, buffers = codec.encode(arrays)
    pieces = list(codec.chunks(buffers))
    assert [piece.tensor_index for piece in pieces] == [1]
    none, one, again = (codec.as_numpy(s, d) for s, d in zip(specs, received(specs, pieces), strict=True))
    assert (none.shape, one.tolist(), again.shape) == ((0, 7), [1], (0,))


def test_zero_rows_become_a_torch_tensor():
    specs, buffers = codec.encode({"none": np.empty((0, 7), np.float32)})
    assert codec.as_torch(specs[0], received(specs, codec.chunks(buffers))[0]).shape == (0, 7)


def test_a_stream_without_tensors_is_complete_at_once():
    assert received([], []) == []


def test_views_that_are_not_contiguous_are_sent_in_row_major_order():
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    for view in (array.T, array[:, ::2], array[::-1]):
        specs, buffers = codec.encode({"x": view})
        np.testing.assert_array_equal(codec.as_numpy(specs[0], buffers[0]), view)
        tensor_specs, tensor_buffers = codec.encode({"x": torch.from_numpy(view.copy()).T})
        np.testing.assert_array_equal(codec.as_numpy(tensor_specs[0], tensor_buffers[0]), view.T)


def test_a_contiguous_array_is_exposed_without_copying():
    array = np.zeros((4, 4), np.float32)
    assert np.shares_memory(codec.encode({"x": array})[1][0], array)


def test_a_tensor_that_requires_gradients_can_be_sent():
    specs, _ = codec.encode({"x": torch.ones(2, 2, requires_grad=True)})
    assert specs[0].datatype == "FP32"


def test_chunks_are_one_mebibyte_and_the_rest(sent):
    _, _, pieces = sent
    assert [(p.tensor_index, p.offset, len(p.data)) for p in pieces] == [
        (0, 0, MIB),
        (0, MIB, MIB),
        (0, 2 * MIB, MIB // 2),
        (1, 0, 40),
    ]


def test_the_announced_checksum_is_xxh3_of_the_raw_bytes(sent):
    arrays, specs, _ = sent
    assert [spec.xxh3_64 for spec in specs] == [xxhash.xxh3_64_intdigest(a.tobytes()) for a in arrays.values()]


def test_pieces_may_be_cut_anywhere(sent):
    arrays, specs, _ = sent
    data = arrays["small"].tobytes()
    pieces = [pb.TensorChunk(tensor_index=0, offset=i, data=data[i : i + 3]) for i in range(0, len(data), 3)]
    assert received(specs[1:], pieces)[0].tobytes() == data


# What cannot be sent


@pytest.mark.parametrize(
    "array",
    [
        np.ones(3, np.float64),
        np.ones(3, ">f4"),
        np.array(["a"]),
        torch.ones(3, dtype=torch.bool),
        torch.ones(3, dtype=torch.complex64),
    ],
)
def test_an_element_type_without_a_name_on_the_wire_is_refused(array):
    with pytest.raises(TensorError, match=r"tensors\[x\]: element type .* cannot be sent, expected one of FP32"):
        codec.encode({"x": array})


@pytest.mark.parametrize("scalar", [np.array(1.0, np.float32), torch.tensor(1.0)])
def test_a_scalar_is_refused(scalar):
    with pytest.raises(TensorError, match=r"tensors\[x\]: has no dimensions"):
        codec.encode({"x": scalar})


# What cannot be announced


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (float_spec(datatype="FP64"), "tensors[x].datatype"),
        (float_spec(datatype=""), "tensors[x].datatype"),
        (float_spec(shape=[]), "tensors[x].shape"),
        (float_spec(shape=[-1, 6]), "tensors[x].shape"),
        (float_spec(shape=[-2, -3]), "tensors[x].shape"),
        (float_spec(byte_length=23), "tensors[x].byte_length"),
        (float_spec(byte_length=0), "tensors[x].byte_length"),
        (float_spec(shape=[1 << 62, 1 << 62], byte_length=0), "tensors[x].byte_length"),
    ],
)
def test_an_announcement_that_cannot_be_right_names_its_field(spec, field):
    with pytest.raises(TensorError) as caught:
        codec.check_specs([spec], max_bytes=NO_LIMIT)
    assert caught.value.field == field


def test_a_name_that_comes_twice_is_refused():
    with pytest.raises(TensorError, match="announced twice"):
        codec.check_specs([float_spec(), float_spec()], max_bytes=NO_LIMIT)


def test_the_limit_is_on_all_tensors_together():
    specs = [float_spec(), float_spec(name="y")]
    codec.check_specs(specs, max_bytes=48)
    with pytest.raises(TensorTooLargeError, match="announce 48 bytes together, the limit is 47"):
        codec.check_specs(specs, max_bytes=47)


def test_sizes_are_checked_before_anything_is_allocated(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("allocated")

    monkeypatch.setattr(codec.np, "empty", refuse)
    petabyte = float_spec(shape=[1 << 48], byte_length=1 << 50)
    with pytest.raises(TensorTooLargeError):
        Assembler([petabyte], max_bytes=MIB)


def test_a_tensor_is_allocated_only_when_its_turn_comes(monkeypatch):
    allocated = []
    empty = np.empty
    monkeypatch.setattr(codec.np, "empty", lambda size, dtype: allocated.append(size) or empty(size, dtype))
    zeros = xxhash.xxh3_64_intdigest(bytes(24))
    assembler = Assembler([float_spec(xxh3_64=zeros), float_spec(name="y")], max_bytes=NO_LIMIT)
    assert allocated == [24]
    assembler.add(pb.TensorChunk(tensor_index=0, data=bytes(24)))
    assert allocated == [24, 24]


# What cannot arrive


def test_chunks_out_of_order_are_refused(sent):
    _, specs, pieces = sent
    with pytest.raises(TensorError, match=f"is for tensor 0 at offset {MIB}, expected tensor 0 at offset 0"):
        received(specs, [pieces[1], pieces[0], *pieces[2:]])


def test_a_repeated_chunk_is_refused(sent):
    _, specs, pieces = sent
    with pytest.raises(TensorError, match=f"at offset 0, expected tensor 0 at offset {MIB}"):
        received(specs, [pieces[0], *pieces])


def test_a_lost_chunk_is_noticed(sent):
    _, specs, pieces = sent
    with pytest.raises(TensorError, match=f"expected tensor 0 at offset {MIB}"):
        received(specs, [pieces[0], *pieces[2:]])


def test_a_tensor_index_that_was_not_announced_is_refused(sent):
    _, specs, pieces = sent
    with pytest.raises(TensorError, match="is for tensor 7"):
        received(specs, [pb.TensorChunk(tensor_index=7, data=pieces[0].data)])


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_stream_that_ends_early_names_the_tensor_that_is_short(sent, kept):
    _, specs, pieces = sent
    name = "small" if kept == 3 else "big"
    with pytest.raises(TensorError, match=rf"tensors\[{name}\]: ended after {kept % 3 * MIB} bytes"):
        received(specs, pieces[:kept])


def test_a_chunk_beyond_its_tensors_end_is_refused():
    with pytest.raises(TensorError, match="is 25 bytes, expected 1 to 24"):
        received([float_spec()], [pb.TensorChunk(data=bytes(25))])


def test_an_empty_chunk_is_refused():
    with pytest.raises(TensorError, match="is 0 bytes, expected 1 to 24"):
        received([float_spec()], [pb.TensorChunk()])


def test_bytes_after_the_end_are_refused(sent):
    _, specs, pieces = sent
    with pytest.raises(TensorError, match="comes after the last announced tensor was complete"):
        received(specs, [*pieces, pieces[-1]])


def test_a_changed_bit_fails_the_checksum(sent):
    _, specs, pieces = sent
    data = bytearray(pieces[1].data)
    data[1000] ^= 1
    pieces[1].data = bytes(data)
    with pytest.raises(TensorChecksumError, match=r"tensors\[big\]: arrived with another checksum"):
        received(specs, pieces)


# One tensor at a time


def test_a_stream_hands_each_tensor_over_with_its_last_chunk(sent):
    arrays, specs, pieces = sent
    stream = TensorStream(specs, max_bytes=NO_LIMIT)
    handed_over = [[data.tobytes() for data in stream.add(piece)] for piece in pieces]
    assert handed_over == [[], [], [arrays["big"].tobytes()], [arrays["small"].tobytes()]]
    assert stream.finish() == []


def test_empty_tensors_are_handed_over_in_their_turn():
    arrays = {"a": np.empty(0, np.uint8), "b": np.ones(2, np.uint8), "c": np.empty(0, np.uint8)}
    specs, buffers = codec.encode(arrays)
    stream = TensorStream(specs, max_bytes=NO_LIMIT)
    (piece,) = codec.chunks(buffers)
    assert [data.nbytes for data in stream.add(piece)] == [0, 2, 0]
    assert stream.finish() == []
    assert [data.nbytes for data in TensorStream(specs[:1], max_bytes=NO_LIMIT).finish()] == [0]


def test_a_changed_bit_is_told_with_its_tensors_last_chunk(sent):
    _, specs, pieces = sent
    specs[0].xxh3_64 ^= 1
    stream = TensorStream(specs, max_bytes=NO_LIMIT)
    for piece in pieces[:2]:
        stream.add(piece)
    with pytest.raises(TensorChecksumError, match=r"tensors\[big\]"):
        stream.add(pieces[2])


# Digests


def test_equal_content_has_an_equal_digest_however_it_was_cut():
    array = np.arange(6, dtype=np.float32)
    specs, _ = codec.encode({"x": array})
    again, _ = codec.encode({"x": torch.arange(6, dtype=torch.float32)})
    assert codec.content_digest(specs, 1, "a") == codec.content_digest(again, 1, "a")


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.arange(1, 7, dtype=np.float32)},
        {"y": np.arange(6, dtype=np.float32)},
        {"x": np.arange(6, dtype=np.float32).reshape(2, 3)},
        {"x": np.arange(6, dtype=np.float32).view(np.int32)},
    ],
)
def test_other_content_name_shape_or_type_has_another_digest(other):
    specs, _ = codec.encode({"x": np.arange(6, dtype=np.float32)})
    assert codec.content_digest(specs) != codec.content_digest(codec.encode(other)[0])


def test_context_is_part_of_the_digest_without_running_together():
    assert codec.content_digest((), "ab", "c") != codec.content_digest((), "a", "bc")


# Imports


def test_the_codec_works_without_torch():
    program = (
        "import sys\n"
        "import numpy as np\n"
        "from jest_wire import tensors\n"
        "specs, buffers = tensors.encode({'x': np.ones((2, 2), np.float32)})\n"
        "assert tensors.as_numpy(specs[0], buffers[0]).sum() == 4\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
