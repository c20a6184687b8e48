"""`jest-server embed` as a real process with the reference model in it, and with a real Triton."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client import CollectorRegistry

from jest_server.embed.verify import verify
from jest_server.examples.decoding import Example
from jest_server.local.triton_server import TritonServer
from jest_server.reference.config import reference_info
from jest_server.reference.repository import read_config
from jest_server.runtime.metrics import EmbeddingFileMetrics
from jest_server.stores.embedding_files.files import EmbeddingFiles
from support.example_data import example_members, hash_of, png, tiny_inputs, write_tar
from support.polling import wait_until
from support.servers import triton_on

KEYS = [f"{number:03}/{i:02}" for number in range(4) for i in range(12)]


@pytest.fixture
def place(tmp_path, stack_repository):
    """A working folder with four shards and a preprocessing that counts its batches and may be slow."""
    for number in range(4):
        write_tar(tmp_path / f"{number:03}.tar", example_members(KEYS[number * 12 : number * 12 + 12]))
    tests = Path(__file__).parents[2]
    (tmp_path / "my_inputs.py").write_text(
        textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(tests)!r})
        from support.example_data import tiny_inputs

        def make(examples):
            with open("batches", "a") as log:
                log.write(examples[0].key + "\\n")
            time.sleep(float(Path("nap").read_text()) if Path("nap").exists() else 0)
            return tiny_inputs(examples)
        """)
    )
    return tmp_path


@pytest.fixture
def command(place, stack_repository):
    """Starts the command in ``place``."""
    in_process = {"JEST_REFERENCE_BACKEND": "in_process", "JEST_MODEL_REPOSITORY": str(stack_repository)}
    started = []

    def start(*options, data="{000..003}.tar", **env):
        arguments = ["--output", "out", *(["--data", data, "--preprocess", "my_inputs:make"] if data else []), *options]
        process = subprocess.Popen(
            [sys.executable, "-c", "from jest_server.cli.app import main; main()", "embed", *arguments],
            cwd=place,
            env=os.environ | in_process | env,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def run(process):
    out, err = process.communicate(timeout=90)
    return process.returncode, out + err


def manifests(place):
    return sorted(place.glob("out/*/*.json"))


def test_a_data_set_is_embedded_and_is_right(place, command):
    code, log = run(command("--batch", "5"))
    assert code == 0, log
    verified = verify(str(place / "out"))
    assert (verified.files, verified.rows, verified.problems) == (4, 48, [])
    code, log = run(command("--verify", data=None))
    assert (code, "4 files with 48 rows are right, 0 are not" in log) == (0, True)


def test_a_killed_run_leaves_whole_shards_and_the_next_one_goes_on(place, command):
    (place / "nap").write_text("0.2")
    process = command("--batch", "3")
    wait_until(lambda: len(manifests(place)) >= 2)
    process.kill()
    process.wait()
    (place / "nap").unlink()
    there = {path: path.stat().st_mtime_ns for path in manifests(place)}
    assert 2 <= len(there) < 4
    assert verify(str(place / "out")).problems == []
    (place / "batches").unlink()
    code, log = run(command("--batch", "3"))
    assert code == 0, log
    assert f'"shards_there_before": {len(there)}' in log
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert len((place / "batches").read_text().splitlines()) == 4 * (4 - len(there))
    assert verify(str(place / "out")).rows == 48


def test_sigterm_ends_the_run_after_the_batch_with_a_status_of_its_own(place, command):
    (place / "nap").write_text("0.2")
    process = command("--batch", "3")
    wait_until(lambda: len(manifests(place)) >= 1)
    process.send_signal(signal.SIGTERM)
    code, log = run(process)
    assert code == 75, log
    assert "run it again to go on" in log
    assert verify(str(place / "out")).problems == []


def test_two_shares_make_the_whole(place, command):
    first = command("--num-shards", "2", "--shard-index", "0")
    second = command(JOB_COMPLETION_INDEX="1", JEST_NUM_SHARDS="2")
    assert [run(process)[0] for process in (first, second)] == [0, 0]
    assert verify(str(place / "out")).rows == 48
    assert verify(str(place / "out")).files == 4


def test_verify_finds_a_flipped_byte_and_says_so_with_its_status(place, command):
    assert run(command())[0] == 0
    file = next(place.glob("out/*/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)
    code, log = run(command("--verify", data=None))
    assert code == 1
    assert f"file {file.name}: checksum is" in log
    assert "3 files with 36 rows are right, 1 are not" in log


def test_a_damaged_input_shard_fails_the_run_and_no_other_shard(place, command):
    (place / "001.tar").write_bytes((place / "001.tar").read_bytes()[:5000])
    code, log = run(command())
    assert (code, verify(str(place / "out")).files) == (1, 3)
    assert "001.tar: ReadError" in log


def test_a_folder_of_pictures_is_embedded_too(place, command):
    (place / "pictures").mkdir()
    for name, data in example_members(["a", "b", "c"]):
        (place / "pictures" / name).write_bytes(data)
    code, log = run(command("--folder-shard-examples", "2", data="pictures"))
    assert code == 0, log
    assert (verify(str(place / "out")).files, verify(str(place / "out")).rows) == (2, 3)


def test_unreadable_examples_are_reported_and_may_be_tolerated(place, command):
    write_tar(place / "000.tar", [("bad.png", png(0)[:50]), ("bad.txt", b"x"), *example_members(KEYS[:12])])
    assert run(command())[0] == 1
    code, log = run(command("--max-left-out", "0.1"))
    assert code == 0, log
    assert '"reason": "picture unreadable"' in log
    assert '"left_out": {"picture unreadable": 1}' in log


@pytest.mark.parametrize(
    ("options", "env", "message"),
    [
        (["--shard-index", "3"], {}, "--shard-index is 3, expected 0 to 0: --num-shards is 1"),
        ([], {"JOB_COMPLETION_INDEX": "3"}, "--shard-index is 3, expected 0 to 0"),
        ([], {"JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX"),
        (["--preprocess", "my_inputs:nothing"], {}, "--preprocess is 'my_inputs:nothing', which cannot be imported"),
        (["--output", "nonsense://x"], {}, "--output: 'nonsense://x' is no path or URL that can be read here"),
        (["--data", "nowhere"], {}, "--data is 'nowhere', expected a folder, or names that end in"),
        (["--verify", "--output", "nonsense://x"], {}, "'nonsense://x' is no path or URL"),
    ],
)
def test_an_option_that_cannot_be_ends_the_command_at_once(command, options, env, message):
    code, log = run(command(*options, **env))
    assert code == 2
    assert message in " ".join(log.replace("│", " ").split())


def test_a_model_repository_that_is_none_ends_the_command(command, tmp_path):
    code, log = run(command(JEST_MODEL_REPOSITORY=str(tmp_path / "none")))
    assert code == 1
    assert "cannot embed" in log


async def test_what_triton_computed_is_found_under_the_trainers_keys(
    place, command, stack_repository, tmp_path, reference_towers
):
    """The expected embeddings are computed here from the exported weights, apart from Triton."""
    problem = TritonServer.available()
    if problem:
        pytest.skip(problem)
    with triton_on(stack_repository, tmp_path / "triton") as triton:
        code, log = run(command("--key", "set/{key}", JEST_REFERENCE_BACKEND="triton", JEST_TRITON_URL=triton.grpc_url))
    assert code == 0, log
    files = EmbeddingFiles(str(place / "out"), EmbeddingFileMetrics(CollectorRegistry()))
    info = reference_info(read_config(stack_repository, "jest_reference"))
    found = await files.get(info, [f"set/{key}" for key in KEYS])
    await files.close()
    examples = [Example(key, Image.open(io.BytesIO(png(hash_of(key)))), f"a {key}") for key in KEYS]
    inputs = {name: torch.from_numpy(array) for name, array in tiny_inputs(examples).items()}
    expected = torch.stack(reference_towers(inputs), 1).numpy()
    assert None not in found
    embeddings = np.frombuffer(b"".join(found), np.float16).reshape(expected.shape)
    assert np.abs(embeddings - expected).max() < 1e-3
