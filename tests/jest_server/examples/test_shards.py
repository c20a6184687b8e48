"""Reading data sets: tars and folders, whole ones and damaged ones."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest
from PIL import Image

from jest_server.examples.decoding import Example, example_of
from jest_server.examples.options import EmbedOptions
from jest_server.examples.shards import UnreadableShard, input_shards
from support.example_data import example_members, png, write_tar


def options(data, **others):
    return EmbedOptions(data=str(data), output="o", preprocess="m:f", **others)


def read(data, **others):
    """Everything of all shards, by key: a caption, or the reason for leaving it out."""
    chosen = options(data, **others)
    found = [(raw, shard) for shard in input_shards(chosen) for raw in shard.examples()]
    examples = [example_of(raw, chosen, shard=shard.name) for raw, shard in found]
    return [(each.key, each.caption if isinstance(each, Example) else each.reason) for each in examples]


def test_members_of_one_name_are_one_example(tmp_path):
    write_tar(tmp_path / "0.tar", example_members(["a/0001", "a/0002"]))
    assert read(tmp_path / "0.tar") == [("a/0001", "a a/0001"), ("a/0002", "a a/0002")]


def test_a_shards_name_and_a_prefix_may_stand_in_keys(tmp_path):
    write_tar(tmp_path / "007.tar", example_members(["x"]))
    assert read(tmp_path / "007.tar", key="set/{shard}/{key}") == [("set/007/x", "a x")]


def test_captions_may_be_a_json_field(tmp_path):
    good, bad = json.dumps({"caption": "é"}).encode(), json.dumps({"caption": 3}).encode()
    members = [
        ("a.png", png(0)),
        ("a.json", good),
        ("b.png", png(0)),
        ("b.json", bad),
        ("c.png", png(0)),
        ("c.json", b"{"),
    ]
    write_tar(tmp_path / "0.tar", members)
    unreadable = "caption unreadable"
    assert read(tmp_path / "0.tar", caption="json:caption") == [("a", "é"), ("b", unreadable), ("c", unreadable)]


def test_other_members_of_an_example_do_not_matter(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.cls", b"3"), ("a.seg.png", b"no picture"), *example_members(["a"])])
    assert read(tmp_path / "0.tar") == [("a", "a a")]


def test_compressed_tars_are_read_too(tmp_path):
    plain = write_tar(tmp_path / "0.tar", example_members(["a"]))
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert read(tmp_path / "1.tar.gz") == [("a", "a a")]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.txt", b"x")], "not one picture"),
        ([("a.png", png(0)), ("a.jpg", png(0)), ("a.txt", b"x")], "not one picture"),
        ([("a.png", png(0))], "no caption"),
        ([("a.png", png(0)), ("a.txt", b"\xff\xfe")], "caption unreadable"),
        ([("a.png", png(0)[:60]), ("a.txt", b"x")], "picture unreadable"),
        ([("a.png", b"GIF89a"), ("a.txt", b"x")], "picture unreadable"),
        ([("a.png", png(0)), ("a.txt", b"x" * 20_000)], "file too large"),
        ([("a.png", png(0)), ("a.png", png(1)), ("a.txt", b"x")], "repeated file"),
        ([("noextension", b"x")], "not named as an example"),
        ([("x" * 513 + ".png", png(0)), ("x" * 513 + ".txt", b"x")], "key too long"),
    ],
)
def test_what_cannot_be_an_example_is_left_out_with_its_reason_and_the_next_one_is_read(tmp_path, members, reason):
    write_tar(tmp_path / "0.tar", [*members, *example_members(["good"])])
    (_, found), good = read(tmp_path / "0.tar", max_member_bytes=10_000)
    assert (found, good) == (reason, ("good", "a good"))


def test_a_link_in_a_tar_is_followed_nowhere(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        picture = tarfile.TarInfo("a.png")
        picture.size = len(png(0))
        tar.addfile(picture, io.BytesIO(png(0)))
    assert read(tmp_path / "0.tar") == [("a.txt", "not a regular file")]


def test_a_small_file_that_decodes_to_a_giant_picture_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    write_tar(tmp_path / "0.tar", [("a.png", png(0, side=40)), ("a.txt", b"x")])
    assert read(tmp_path / "0.tar") == [("a", "picture unreadable")]


@pytest.mark.parametrize("keep", [100, 700, 5 * 512, 10 * 512, -10240 + 512])
def test_a_tar_that_was_cut_off_is_unreadable_and_never_just_shorter(tmp_path, keep):
    path = write_tar(tmp_path / "0.tar", example_members([f"{i}" for i in range(8)]))
    data = path.read_bytes()
    end = data.rstrip(b"\0")
    whole = data[: (len(end) + 511) // 512 * 512]
    path.write_bytes(whole[:keep] if keep > 0 else whole)
    with pytest.raises(UnreadableShard, match=r"0\.tar: "):
        read(path)


def test_a_tar_with_a_damaged_header_in_the_middle_is_unreadable(tmp_path):
    path = write_tar(tmp_path / "0.tar", example_members(["a", "b", "c"]))
    data = bytearray(path.read_bytes())
    at = data.index(b"b.png")
    data[at : at + 4] = b"zzzz"
    path.write_bytes(data)
    with pytest.raises(UnreadableShard, match=r"damaged header"):
        read(path)


def test_a_file_that_is_no_tar_is_unreadable(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"nonsense" * 1000)
    with pytest.raises(UnreadableShard, match=r"0\.tar: ReadError"):
        read(tmp_path / "0.tar")


def test_a_tar_that_is_not_there_is_told_when_it_is_its_turn(tmp_path):
    (shard,) = input_shards(options(tmp_path / "0.tar"))
    with pytest.raises(UnreadableShard, match=r"0\.tar: FileNotFoundError"):
        shard.size()


def test_a_folder_is_cut_into_shards_of_examples(tmp_path):
    for name, data in [*example_members(["a", "b", "sub/c"]), ("d.txt", b"no picture"), ("e.png", png(0))]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    shards = input_shards(options(tmp_path, folder_shard_examples=2))
    assert [shard.name for shard in shards] == ["00000", "00001"]
    assert sorted(read(tmp_path)) == [("a", "a a"), ("b", "a b"), ("e", "no caption"), ("sub/c", "a sub/c")]


def test_files_of_a_folder_that_are_too_large_or_go_away_are_left_out(tmp_path):
    for name, data in example_members(["a", "b"]):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "a.txt").write_bytes(b"x" * 20_000)
    (shard,) = input_shards(options(tmp_path, max_member_bytes=10_000))
    (tmp_path / "b.png").unlink()
    assert [raw.problem.reason for raw in shard.examples()] == ["file too large", "file unreadable"]


def test_shares_are_disjoint_and_together_all(tmp_path):
    for number in range(5):
        write_tar(tmp_path / f"{number}.tar", [])
    shares = [
        [shard.source for shard in input_shards(options(tmp_path / "*.tar", shard_index=index, num_shards=2))]
        for index in range(2)
    ]
    assert [len(share) for share in shares] == [3, 2]
    assert sorted(shares[0] + shares[1]) == [(tmp_path / f"{number}.tar").as_uri() for number in range(5)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere", "--data is '.*nowhere', expected a folder, or names that end in .tar"),
        ("*.tar", r"--data is '.*\*.tar', which matches no file and no picture"),
        (".", "which matches no file and no picture"),
    ],
)
def test_data_that_is_none_is_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        input_shards(options(tmp_path / data))


def test_a_url_that_nothing_reads_is_refused():
    with pytest.raises(ValueError, match=r"--data: 'nonsense://x\.tar' is no path or URL"):
        input_shards(options("nonsense://x.tar"))
