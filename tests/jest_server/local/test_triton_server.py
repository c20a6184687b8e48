from __future__ import annotations

import urllib.request
from pathlib import Path

import psutil
import pytest

from jest_server.local import triton_server as embedded
from jest_server.local.process import ServerStartError
from jest_server.local.triton_server import TritonServer
from support import slow_model
from support.references import export_slow_model
from support.servers import triton_on

if TritonServer.available():
    pytest.skip(str(TritonServer.available()), allow_module_level=True)


@pytest.fixture
def repository(tmp_path):
    """One model that is loaded at once."""
    export_slow_model(tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def server(repository, tmp_path):
    with triton_on(repository, tmp_path / "work") as server:
        yield server


def shared_memory_of(server):
    return list(Path("/dev/shm").glob(f"{server._id}*"))


def family_of(server):
    process = psutil.Process(server.pid)
    return [process, *process.children(recursive=True)]


def all_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=30)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_it_listens_on_loopback_only(server):
    connections = psutil.Process(server.pid).net_connections("tcp")
    listening = {c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_its_metrics_are_where_it_says(server):
    with urllib.request.urlopen(server.metrics_url) as answer:
        assert b"nv_inference_request_success" in answer.read()


@pytest.mark.parametrize("end", [TritonServer.stop, TritonServer.kill])
def test_nothing_is_left_when_it_has_ended(server, tmp_path, end):
    family = family_of(server)
    assert len(family) > 1
    assert shared_memory_of(server)
    end(server)
    assert all_gone(family)
    assert not shared_memory_of(server)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["triton.log"]


def test_it_starts_again_on_the_same_ports(server):
    url = server.grpc_url
    server.kill()
    server.start()
    assert server.alive
    assert server.grpc_url == url


def test_what_a_crash_left_behind_is_gone_after_the_next_start(server):
    psutil.Process(server.pid).kill()
    psutil.Process(server.pid).wait()
    left = shared_memory_of(server)
    assert left
    server.start()
    assert not set(left) & set(shared_memory_of(server))


def test_a_model_that_cannot_be_loaded_is_told_with_tritons_own_words(repository, tmp_path):
    (repository / slow_model.NAME / "1" / "model.py").write_text("raise RuntimeError('no such tower')")
    server = TritonServer(repository, tmp_path / "work")
    with pytest.raises(ServerStartError, match=r"tritonserver ended with status 1; (?s:.*)failed to load all models"):
        server.start()
    assert not shared_memory_of(server)


def test_a_port_lost_to_another_triton_is_noticed(server, repository, tmp_path):
    second = TritonServer(repository, tmp_path / "second")
    second._ports = dict(server._ports)
    with pytest.raises(ServerStartError, match="tritonserver ended with status 1"):
        second.start()


def test_a_machine_without_the_package_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "_distribution", lambda: None)
    assert "nvidia-pytriton package is not installed" in TritonServer.available()
    with pytest.raises(ServerStartError, match="cannot start Triton: the nvidia-pytriton package is not installed"):
        TritonServer(tmp_path, tmp_path).start()


def test_a_python_that_the_package_does_not_know_is_told(monkeypatch):
    monkeypatch.setattr(embedded, "_PYTHON", "2.7")
    assert TritonServer.available() == "nvidia-pytriton has no Python backend for Python 2.7"


def test_a_backend_whose_libpython_is_lacking_is_told_instead_of_waited_for(monkeypatch):
    lacking = embedded._distribution() / "python_backend_stubs" / "3.8" / "triton_python_backend_stub"
    monkeypatch.setattr(embedded, "_stub", lambda _: lacking)
    assert "libpython3.8.so.1.0 => not found" in TritonServer.available()
