"""What the command may be told, and how it answers what cannot be."""

from __future__ import annotations

import pytest

from jest_server.examples.options import EmbedOptions, expand_braces

RIGHT = {"data": "d", "output": "o", "preprocess": "m:f"}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("data", "", r"--data is '', expected a name"),
        ("output", "", r"--output is '', expected a name"),
        ("preprocess", "", r"--preprocess is '', expected a name"),
        ("preprocess", "module", r"--preprocess is 'module', expected MODULE:FUNCTION"),
        ("key", "{shard}", r"--key is '\{shard\}', expected a template with \{key\}"),
        ("key", "{key}/{who}", r"--key is '\{key\}/\{who\}', expected a template"),
        ("key", "{key!r}", r"--key is '\{key!r\}', expected a template"),
        ("key", "{key.__class__}", r"--key is '\{key.__class__\}', expected a template"),
        ("key", "{key", r"--key is '\{key', expected a template such as"),
        ("caption", "csv", r"--caption is 'csv', expected txt, or json:FIELD"),
        ("caption", "json:", r"--caption is 'json:', expected txt, or json:FIELD"),
        ("batch", 0, "--batch is 0, expected at least 1"),
        ("num_shards", 0, "--num-shards is 0, expected at least 1"),
        ("shard_index", 1, "--shard-index is 1, expected 0 to 0: --num-shards is 1"),
        ("shard_index", -1, "--shard-index is -1, expected 0 to 0"),
        ("folder_shard_examples", 0, "--folder-shard-examples is 0, expected at least 1"),
        ("max_member_bytes", 0, "--max-member-bytes is 0, expected at least 1"),
        ("max_left_out", 1.5, "--max-left-out is 1.5, expected a share from 0 to 1"),
        ("max_left_out", float("nan"), "--max-left-out is nan, expected a share from 0 to 1"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name_value_and_expectation(option, value, message):
    with pytest.raises(ValueError, match=message):
        EmbedOptions(**RIGHT | {option: value})


def test_keys_follow_the_template():
    options = EmbedOptions(**RIGHT, key="laion/{shard}/{key}")
    assert options.example_key(key="a/1", shard="000") == "laion/000/a/1"


def test_a_key_that_no_trainer_can_submit_is_refused():
    with pytest.raises(ValueError, match="is 514 bytes long, expected up to 512"):
        EmbedOptions(**RIGHT).example_key(key="é" * 257, shard="000")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{000..000}", ["000"]),
    ],
)
def test_braces_expand_as_a_shell_does(pattern, expected):
    assert expand_braces(pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{x}.tar", "braces with a range"),
        ("{5..2}.tar", "ascending ranges"),
        ("{0..9999999}.tar", "ascending ranges"),
        ("{0..9999}{0..9999}.tar", "names of up to 1000000 files, not 100000000"),
    ],
)
def test_braces_that_cannot_be_are_refused(pattern, message):
    with pytest.raises(ValueError, match=rf"--data is .*expected {message}"):
        expand_braces(pattern)
