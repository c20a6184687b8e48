from __future__ import annotations

import shutil
import urllib.request
from pathlib import Path

import psutil
import pytest

from jest_server.embedded import triton as embedded
from jest_server.embedded.process import ServerStartError
from jest_server.embedded.triton import TritonServer
from support.servers import RestartableTriton

if TritonServer.available():
    pytest.skip(str(TritonServer.available()), allow_module_level=True)


def shared_memory_of(server):
    return list(Path("/dev/shm").glob(f"{server._id}*"))


def family_of(server):
    process = psutil.Process(server.pid)
    return [process, *process.children(recursive=True)]


def all_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=5)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_it_listens_on_loopback_only(triton):
    listening = {c.laddr for c in psutil.Process(triton.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert f"127.0.0.1:{triton._ports['grpc']}" == triton.grpc_url


def test_its_metrics_are_where_it_says(triton):
    with urllib.request.urlopen(triton.metrics_url) as answer:
        assert b"nv_inference_request_success" in answer.read()


def test_nothing_is_left_after_a_stop(reference_repository, tmp_path):
    server = TritonServer(reference_repository, tmp_path)
    server.start()
    family = family_of(server)
    assert len(family) > 2
    assert shared_memory_of(server)
    server.stop()
    assert all_gone(family)
    assert not shared_memory_of(server)
    assert [path.name for path in tmp_path.iterdir()] == ["triton.log"]


def test_nothing_is_left_after_a_kill_and_it_starts_again_on_the_same_ports(triton):
    family, url = family_of(triton), triton.grpc_url
    triton.kill()
    assert all_gone(family)
    assert not shared_memory_of(triton)
    triton.start()
    assert triton.grpc_url == url


def test_a_model_that_cannot_be_loaded_is_told_with_tritons_own_words(reference_repository, tmp_path):
    repository = shutil.copytree(reference_repository, tmp_path / "repository")
    (repository / "jest_text_encoder" / "1" / "weights.safetensors").unlink()
    server = TritonServer(repository, tmp_path / "work")
    with pytest.raises(ServerStartError, match=r"tritonserver ended with status 1; (?s:.*)failed to load all models"):
        server.start()
    assert not shared_memory_of(server)


def test_a_port_lost_to_another_triton_is_noticed(triton, reference_repository, tmp_path):
    server = RestartableTriton(reference_repository, tmp_path)
    server._ports = dict(triton._ports)
    with pytest.raises(ServerStartError, match="tritonserver ended with status 1"):
        server.start()


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
