"""Fixtures that every package's tests share; each starts its real server when the first test asks for it."""

from __future__ import annotations

import pytest

from support.servers import queue_kinds, queue_server_of


@pytest.fixture(scope="session", params=queue_kinds())
def queue_server(request, tmp_path_factory):
    """URL of a fresh Redis-like server of every kind that is installed; tests share it, so they use keys of their own."""
    with queue_server_of(request.param, tmp_path_factory.mktemp(request.param)) as server:
        yield server.url
