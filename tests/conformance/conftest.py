"""Points the suite at a server: `pytest tests/conformance --server HOST:PORT`, or at one that it starts itself."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from conformance.speaker import OPTIONS, Bearer, Speaker


def pytest_addoption(parser):
    parser.addoption("--server", help="host:port of a selector to talk to; none: start the stack here")
    parser.addoption("--reference-model", default="jest_reference", help="reference model that the server serves")
    parser.addoption("--ca", type=Path, help="PEM of the authority of the server's certificate; none: plain text")
    parser.addoption("--certificate", type=Path, help="PEM of the certificate to show, if the server asks for one")
    parser.addoption("--certificate-key", type=Path, help="PEM of its key")
    parser.addoption("--token-file", type=Path, help="file with the token to send")


@pytest.fixture(scope="session")
def server_address(request):
    return request.config.getoption("--server", default=None) or request.getfixturevalue("stack").address


@pytest.fixture(scope="session")
def open_channel(request, server_address):
    """Opens a channel to the server, with the credentials that the options name."""

    def given(name):
        path = request.config.getoption(name, default=None)
        return None if path is None else path.read_bytes()

    authority, token = given("--ca"), given("--token-file")

    def open_channel():
        if authority is None:
            channel = grpc.insecure_channel(server_address, OPTIONS)
        else:
            credentials = grpc.ssl_channel_credentials(authority, given("--certificate-key"), given("--certificate"))
            channel = grpc.secure_channel(server_address, credentials, OPTIONS)
        return channel if token is None else grpc.intercept_channel(channel, Bearer(token.decode().strip()))

    return open_channel


@pytest.fixture
def speaker(request, server_address, open_channel):
    model = request.config.getoption("--reference-model", default="jest_reference")
    speaker = Speaker(server_address, model, channel=open_channel())
    yield speaker
    speaker.close()
