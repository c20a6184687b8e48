import asyncio
import ssl

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from jest_server.local.process import free_port
from jest_server.runtime.grpc_server import GrpcServer
from jest_server.runtime.health import LIVENESS
from jest_server.runtime.metrics import SelectorMetrics
from jest_server.runtime.security.transport import is_loopback
from jest_server.runtime.settings import ProcessSettings
from support.certificates import make_authority, needs_openssl, sign

pytestmark = needs_openssl


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return make_authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def files(authority, tmp_path):
    return sign(authority, tmp_path, "server")


@pytest.fixture
async def serve():
    """Starts servers; they are ended with the test. Returns the port."""
    servers = []

    async def start(**settings):
        settings = ProcessSettings(**{"listen": "127.0.0.1:0", "drain_delay_s": 0, "grace_s": 1} | settings)
        servers.append(GrpcServer(settings, SelectorMetrics(CollectorRegistry()).rpc))
        port = await servers[-1].start(("jest.test",))
        await servers[-1].set_ready(ready=True)
        return port

    yield start
    for server in servers:
        await server.drain()


async def health(channel, service=""):
    """The health status, or the status code of the refusal."""
    request = health_pb2.HealthCheckRequest(service=service)
    async with channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return answer.status


def secure(port, authority, client=None):
    own = (
        {}
        if client is None
        else {"private_key": client.key.read_bytes(), "certificate_chain": client.certificate.read_bytes()}
    )
    return grpc.aio.secure_channel(
        f"localhost:{port}", grpc.ssl_channel_credentials(authority.certificate.read_bytes(), **own)
    )


SERVING = health_pb2.HealthCheckResponse.SERVING


async def test_a_server_with_tls_answers_through_tls_and_not_in_plain_text(serve, files, authority):
    port = await serve(tls_certificate=files.certificate, tls_key=files.key)
    assert await health(secure(port, authority)) == SERVING
    assert await health(grpc.aio.insecure_channel(f"127.0.0.1:{port}")) is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_of_a_stranger_is_not_taken_for_the_servers(serve, files, tmp_path):
    port = await serve(tls_certificate=files.certificate, tls_key=files.key)
    stranger = make_authority(tmp_path, "stranger")
    assert await health(secure(port, stranger)) is grpc.StatusCode.UNAVAILABLE


async def test_with_a_client_authority_only_its_clients_are_answered(serve, files, authority, tmp_path):
    port = await serve(tls_certificate=files.certificate, tls_key=files.key, tls_client_ca=authority.certificate)
    assert await health(secure(port, authority, sign(authority, tmp_path, "client"))) == SERVING
    assert await health(secure(port, authority)) is grpc.StatusCode.UNAVAILABLE
    stranger = sign(make_authority(tmp_path, "stranger"), tmp_path, "strange-client")
    assert await health(secure(port, authority, stranger)) is grpc.StatusCode.UNAVAILABLE


async def test_a_renewed_certificate_is_shown_from_the_next_connection_on(serve, files, authority, tmp_path):
    port = await serve(tls_certificate=files.certificate, tls_key=files.key)
    assert await health(secure(port, authority)) == SERVING
    renewed = sign(authority, tmp_path, "renewed")
    files.key.write_bytes(renewed.key.read_bytes())
    files.certificate.write_bytes(renewed.certificate.read_bytes())
    assert await health(secure(port, authority)) == SERVING
    shown = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))
    assert shown.split() == renewed.certificate.read_text().split()


async def test_a_certificate_that_went_bad_leaves_the_old_one_in_use(serve, files, authority):
    port = await serve(tls_certificate=files.certificate, tls_key=files.key)
    files.key.unlink()
    assert await health(secure(port, authority)) == SERVING


async def test_probes_that_speak_no_tls_have_a_port_of_their_own(serve, files):
    port = free_port()
    await serve(tls_certificate=files.certificate, tls_key=files.key, health_listen=f"127.0.0.1:{port}")
    assert await health(grpc.aio.insecure_channel(f"127.0.0.1:{port}")) == SERVING


async def test_a_server_that_is_not_ready_is_alive_all_the_same():
    port = free_port()
    settings = ProcessSettings(listen="127.0.0.1:0", health_listen=f"127.0.0.1:{port}", drain_delay_s=0, grace_s=1)
    server = GrpcServer(settings, SelectorMetrics(CollectorRegistry()).rpc)
    await server.start(("jest.test",))
    ready = await health(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
    alive = await health(grpc.aio.insecure_channel(f"127.0.0.1:{port}"), LIVENESS)
    await server.drain()
    assert (ready, alive) == (health_pb2.HealthCheckResponse.NOT_SERVING, SERVING)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"listen": "0.0.0.0:50051"}, r"JEST_LISTEN is 0\.0\.0\.0:50051.*no TLS"),
        ({"listen": "[::]:50051"}, "no TLS"),
        ({"listen": "10.1.2.3:50051"}, "no TLS"),
        ({"listen": "selector.example:50051"}, "no TLS"),
        ({"listen": ":50051"}, "no TLS"),
        ({"listen": "0.0.0.0:50051", "tls": True}, "anybody could call.*JEST_TOKENS_FILE or JEST_TLS_CLIENT_CA"),
        ({"tls_certificate": "only.pem"}, "JEST_TLS_KEY is not set"),
        ({"tls_key": "only.key"}, "JEST_TLS_CERTIFICATE is not set"),
        ({"tls_client_ca": "only.pem"}, "JEST_TLS_CERTIFICATE is not set"),
        ({"tokens_file": "/nowhere/tokens.json"}, r"token file /nowhere/tokens\.json cannot be read"),
    ],
)
async def test_what_would_let_strangers_in_is_refused_at_the_start(settings, message, files):
    if settings.pop("tls", False):
        settings |= {"tls_certificate": files.certificate, "tls_key": files.key}
    with pytest.raises(ValueError, match=message):
        GrpcServer(ProcessSettings(**settings), SelectorMetrics(CollectorRegistry()).rpc)


async def test_files_that_cannot_be_read_are_named_at_the_start(serve, files, tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.pem cannot be read: No such file"):
        await serve(tls_certificate=tmp_path / "nothing.pem", tls_key=files.key)


async def test_what_is_asked_for_by_name_is_served(serve):
    port = await serve(listen="0.0.0.0:0", allow_insecure=True)
    assert await health(grpc.aio.insecure_channel(f"127.0.0.1:{port}")) == SERVING


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "127.8.8.8:1", "localhost:1", "[::1]:1"])
def test_loopback_is_known(listen):
    assert is_loopback(listen)
