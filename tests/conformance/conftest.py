"""Points the suite at a server: `pytest tests/conformance --server HOST:PORT`, or at one that it starts itself."""

from __future__ import annotations

import pytest

from conformance.speaker import Speaker


def pytest_addoption(parser):
    parser.addoption("--server", help="host:port of a selector to talk to; none: start the stack here")
    parser.addoption("--reference-model", default="jest_reference", help="reference model that the server serves")


@pytest.fixture(scope="session")
def server_address(request):
    return request.config.getoption("--server", default=None) or request.getfixturevalue("stack").address


@pytest.fixture
def speaker(request, server_address):
    speaker = Speaker(server_address, request.config.getoption("--reference-model", default="jest_reference"))
    yield speaker
    speaker.close()
