"""Examples read by reference: from real folders, tars and a real HTTP server that would lead elsewhere."""

from __future__ import annotations

import http.server
import tempfile
import threading
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pytest

from jest_server.domain.errors import UnreadableSource
from jest_server.domain.sources import AllowedSources
from jest_server.examples import source_reader
from jest_server.examples.options import EmbedOptions
from jest_server.examples.source_reader import SourceReader
from support.pictures import png, write_tar
from support.super_batches import reference_of_pictures

REFERENCE = reference_of_pictures(side=32)


def reader(*prefixes, function="inputs", **options):
    options = {"data": "-", "output": "-", "preprocess": f"support.preprocess_tiny:{function}"} | options
    return SourceReader(AllowedSources(prefixes), EmbedOptions(**options))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "allowed"
    folder.mkdir()
    write_tar(folder / "00000.tar", 5)
    for number in range(3):
        (folder / f"cat-{number}.png").write_bytes(png(number))
        (folder / f"cat-{number}.txt").write_text(f"caption {number}")
    return folder


async def refused(reader, source):
    with pytest.raises(UnreadableSource) as caught:
        await reader.inputs(REFERENCE, [source])
    return caught.value.reason, str(caught.value)


async def test_members_of_tars_and_pictures_become_inputs_in_the_order_asked(folder):
    here = f"file://{folder}/"
    sources = [f"{here}00000.tar#000002", f"{here}cat-1.png", f"{here}00000.tar#000000"]
    made = await reader(here).inputs(REFERENCE, sources)
    assert made["image"].shape == (3, 3, 32, 32)
    again = await reader(here).inputs(REFERENCE, [f"{here}cat-{n}.png" for n in (2, 1, 0)])
    np.testing.assert_array_equal(made["image"], again["image"])
    np.testing.assert_array_equal(made["tokens"], again["tokens"])
    assert bytes(made["tokens"][0].astype(np.uint8)).rstrip() == b"caption 2"


async def test_any_store_that_fsspec_reads_will_do():
    with fsspec.open("memory://train/00000.tar", "wb") as file:
        write_tar_to(file)
    made = await reader("memory://train/").inputs(REFERENCE, ["memory://train/00000.tar#000001"])
    assert made["image"].shape == (1, 3, 32, 32)


def write_tar_to(file):
    with tempfile.TemporaryDirectory() as folder:
        file.write(Path(write_tar(f"{folder}/x.tar", 3)).read_bytes())


async def test_a_tars_headers_are_read_once_and_only_so_many_tars_are_remembered(folder, monkeypatch):
    monkeypatch.setattr(source_reader, "TARS_KNOWN", 2)
    here = f"file://{folder}/"
    for name in ("a", "b", "c"):
        write_tar(folder / f"{name}.tar", 2)
    reads = reader(here)
    for name in ("a", "b", "c"):
        await reads.inputs(REFERENCE, [f"{here}{name}.tar#000000"])
    assert [url.rpartition("/")[2] for url in reads._tars] == ["b.tar", "c.tar"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("00000.tar#000009", "no example '000009'"),
        ("missing.tar#000000", "FileNotFoundError"),
        ("missing.png", "FileNotFoundError"),
        ("bare.png", "FileNotFoundError"),
        ("notes.txt", "expected one of jpg, jpeg, png, webp, or .tar#KEY"),
        ("cut.tar#000004", "ReadError"),
        ("noise.tar#000000", "ReadError"),
        ("broken.tar#000000", "picture unreadable"),
        ("broken.tar#000001", "no caption"),
        ("large.tar#000000", "more than"),
        ("large.png", "has more than 20000 bytes"),
    ],
)
async def test_what_cannot_be_read_is_told_with_its_source(folder, name, says):
    (folder / "bare.png").write_bytes(png(0))
    (folder / "notes.txt").write_text("x")
    (folder / "large.png").write_bytes(bytes(30_000))
    (folder / "large.txt").write_text("x")
    (folder / "cut.tar").write_bytes((folder / "00000.tar").read_bytes()[:5000])
    (folder / "noise.tar").write_bytes(np.random.default_rng(0).bytes(5000))
    write_tar(folder / "broken.tar", 0, more={"000000.png": b"no", "000000.txt": b"x", "000001.png": png(1)})
    write_tar(folder / "large.tar", 0, more={"000000.png": bytes(30_000), "000000.txt": b"x"})
    here = f"file://{folder}/"
    reason, message = await refused(reader(here, max_member_bytes=20_000), f"{here}{name}")
    assert reason == "SOURCE_UNREADABLE"
    assert f"source '{here}{name}'" in message
    assert says in message or "expected up to 20000" in message


async def test_a_link_out_of_the_allowed_folders_is_not_followed(folder, tmp_path):
    (tmp_path / "secret.png").write_bytes(png(7))
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "link.txt").write_text("x")
    (folder / "up").symlink_to(tmp_path)
    here = f"file://{folder}/"
    for name in ("link.png", "up/secret.png"):
        reason, message = await refused(reader(here), f"{here}{name}")
        assert reason == "SOURCE_UNREADABLE"
        assert "leads out of the allowed folders" in message


async def test_a_captions_link_out_is_not_followed_either(folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / "dog.png").write_bytes(png(7))
    (folder / "dog.txt").symlink_to(tmp_path / "secret")
    here = f"file://{folder}/"
    _, message = await refused(reader(here), f"{here}dog.png")
    assert "leads out of the allowed folders" in message


async def test_what_is_not_allowed_is_refused_here_too(folder, tmp_path):
    reason, message = await refused(reader(f"file://{folder}/"), f"file://{tmp_path}/secret.png")
    assert reason == "SOURCE_NOT_ALLOWED"
    assert "expected a URL that starts with one of" in message


@pytest.mark.parametrize(
    ("function", "says"), [("nothing", "expected a dict of numpy arrays"), ("fails", "cannot take")]
)
async def test_a_function_that_does_not_take_an_example_is_told(folder, function, says):
    here = f"file://{folder}/"
    reason, message = await refused(reader(here, function=function), f"{here}cat-0.png")
    assert reason == "PREPROCESSING_FAILED"
    assert says in message


@pytest.mark.parametrize("name", ["support.preprocess_tiny:absent", "no.such.module:f"])
def test_a_function_that_is_not_there_is_told_at_the_start(name):
    with pytest.raises(ValueError, match="cannot be imported"):
        SourceReader(AllowedSources(()), EmbedOptions(data="-", output="-", preprocess=name))


# HTTP


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; below /away/ it points to a secret elsewhere."""

    def do_GET(self):
        self.answer(super().do_GET)

    def do_HEAD(self):
        self.answer(super().do_HEAD)

    def send_part(self, asked):
        """Answers a range, which the base class does not know."""
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        data = Path(self.translate_path(self.path)).read_bytes()
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)

    def answer(self, serve):
        asked = self.headers["range"]
        if asked and self.server.knows_ranges and "away" not in self.path and "flaky" not in self.path:
            self.send_part(asked)
            return
        self.server.asked.append(urlsplit(self.path).path)
        if self.path.startswith("/allowed/away/"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/allowed/away/", "/secret/"))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path.startswith("/allowed/flaky/") and len(self.server.asked) < 3:
            self.send_error(503)
        else:
            self.path = self.path.replace("/flaky/", "/")
            serve()

    def log_message(self, *_):
        pass


@pytest.fixture
def web(folder, tmp_path):
    (tmp_path / "secret").mkdir()
    for name in ("cat-0.png", "cat-0.txt", "00000.tar"):
        (tmp_path / "secret" / name).write_bytes((folder / name).read_bytes())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    server.asked = []
    server.knows_ranges = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server, f"http://127.0.0.1:{server.server_port}/allowed/"
    server.shutdown()
    thread.join()
    server.server_close()


async def test_pictures_and_tars_are_read_over_http(web):
    _, here = web
    made = await reader(here).inputs(REFERENCE, [f"{here}cat-0.png", f"{here}00000.tar#000001"])
    assert made["image"].shape == (2, 3, 32, 32)


async def test_a_server_that_sends_whole_files_for_parts_is_told(web):
    server, here = web
    server.knows_ranges = False
    _, message = await refused(reader(here), f"{here}00000.tar#000001")
    assert "does not read parts of files" in message or "ReadError" in message or "Range" in message


@pytest.mark.parametrize("name", ["away/cat-0.png", "away/00000.tar#000000"])
async def test_a_redirect_is_not_followed(web, name):
    server, here = web
    reason, message = await refused(reader(here), f"{here}{name}")
    assert reason == "SOURCE_UNREADABLE"
    assert "redirect" in message
    assert not any(path.startswith("/secret/") for path in server.asked)


async def test_a_store_that_fails_for_a_moment_is_asked_again(web):
    _, here = web
    made = await reader(here).inputs(REFERENCE, [f"{here}flaky/cat-1.png"])
    assert made["image"].shape == (1, 3, 32, 32)
