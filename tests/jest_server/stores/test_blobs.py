import pytest
from hypothesis import given
from hypothesis import strategies as st

from jest_server.stores import blobs


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(), max_size=4), st.binary(max_size=64))
def test_what_was_packed_comes_back(description, data):
    unpacked, view = blobs.unpack(blobs.pack(description, data))
    assert unpacked == description
    assert bytes(view) == data


def test_several_buffers_become_one():
    _, view = blobs.unpack(blobs.pack({}, b"ab", bytearray(b"c"), memoryview(b"de")))
    assert bytes(view) == b"abcde"


@pytest.mark.parametrize("blob", [b"", b"no newline", b"not json\n", b"[1]\n"])
def test_what_was_not_packed_is_refused(blob):
    with pytest.raises((ValueError, TypeError)):
        blobs.unpack(blob)
