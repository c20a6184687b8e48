"""Which sources may be read, as far as their names tell."""

from __future__ import annotations

import pytest

from jest_server.domain.sources import AllowedSources, Source

ALLOWED = AllowedSources(("s3://bucket/train/", "file:///data/", "https://data.example/pairs/"))


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("s3://bucket/train/00001.tar#000017", Source("s3://bucket/train/00001.tar", "000017")),
        ("s3://bucket/train/deep/er/00001.tar#a/b c", Source("s3://bucket/train/deep/er/00001.tar", "a/b c")),
        ("file:///data/cat.jpg", Source("file:///data/cat.jpg", None)),
        ("https://data.example/pairs/cat.png", Source("https://data.example/pairs/cat.png", None)),
    ],
)
def test_what_lies_under_a_prefix_may_be_read(text, source):
    assert ALLOWED.check(text) == source


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/private/00001.tar#k",
        "s3://bucket/train-private/00001.tar#k",
        "s3://other/train/00001.tar#k",
        "gs://bucket/train/00001.tar#k",
        "S3://bucket/train/00001.tar#k",
        "file:///etc/passwd.jpg",
        "/data/cat.jpg",
        "data/cat.jpg",
        "http://data.example/pairs/cat.png",
        "https://data.example.evil/pairs/cat.png",
        "https://data.example@evil/pairs/cat.png",
        "https://evil/https://data.example/pairs/cat.png",
        "http://169.254.169.254/latest/meta-data/x.png",
        "simplecache::s3://bucket/train/00001.tar#k",
        "memory://data/cat.jpg",
        "",
    ],
)
def test_what_lies_elsewhere_may_not(text):
    with pytest.raises(ValueError, match="expected a URL that starts with one of s3://bucket/train/, file:///data/"):
        ALLOWED.check(text)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("../private/cat.jpg", "without empty parts, '.' or '..'"),
        ("a/../../etc/cat.jpg", "without empty parts"),
        ("./cat.jpg", "without empty parts"),
        ("/etc/cat.jpg", "without empty parts"),
        ("a//b.jpg", "without empty parts"),
        ("%2e%2e/cat.jpg", "no escapes"),
        ("..%2fcat.jpg", "no escapes"),
        ("a\\..\\cat.jpg", "no escapes, wildcards"),
        ("*.jpg", "wildcards"),
        ("cat.jpg?x=1", "queries"),
        ("a::file:///etc/cat.jpg", "chained URLs"),
        ("a\n.jpg", "plain path"),
        ("a\x00.jpg", "plain path"),
        ("00001.tar", r"expected URL\.tar#KEY"),
        ("cat.jpg#key", r"expected URL\.tar#KEY"),
        ("00001.tar#", "expected the example's key after the #"),
        ("00001.tar.gz#key", r"expected URL\.tar#KEY"),
        ("x" * 3000 + ".jpg", "bytes long, expected up to 2048"),
    ],
)
def test_what_could_lead_somewhere_else_is_refused(rest, message):
    with pytest.raises(ValueError, match=message):
        ALLOWED.check(f"file:///data/{rest}")


@pytest.mark.parametrize("prefix", ["s3://bucket/train", "s3://bucket", "/data/", "data/", "", "file://"])
def test_a_prefix_that_could_mean_more_than_it_says_is_refused(prefix):
    with pytest.raises(ValueError, match="expected SCHEME://PLACE/ with the slash at its end"):
        AllowedSources((prefix,))


def test_without_prefixes_nothing_may_be_read():
    with pytest.raises(ValueError, match="this server reads no sources: JEST_SOURCE_PREFIXES is empty"):
        AllowedSources(()).check("s3://bucket/train/00001.tar#k")
