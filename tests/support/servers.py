"""Real servers for tests, as context managers: whatever a test does to them, nothing of them outlives the block."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from jest_server.local import valkey_server
from jest_server.local.triton_server import TritonServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


NO_REDIS = "redis-server is not on the PATH"
needs_redis_server = pytest.mark.skipif(shutil.which("redis-server") is None, reason=NO_REDIS)
QUEUE_KINDS = ["valkey", pytest.param("redis", marks=needs_redis_server)]
"""The Redis-like servers to run a test against, as parameters."""


@contextmanager
def queue_server_of(kind: str, data_dir: Path, *, append_only: bool = False) -> Iterator[valkey_server.ValkeyServer]:
    """Runs a server of one kind; the caller may kill, stop and start it."""
    server = valkey_server.ValkeyServer(data_dir, executable=valkey_server.executables()[kind], append_only=append_only)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class RestartableTriton(TritonServer):
    """A Triton that tests share: who breaks it restarts it."""

    def restart(self) -> None:
        """Starts it again, on the same ports, whatever state it is in."""
        self.kill()
        self.start()


@contextmanager
def triton_on(repository: Path, work_dir: Path) -> Iterator[RestartableTriton]:
    """Serves a model repository; at the end it is killed, which is faster than asking."""
    server = RestartableTriton(repository, work_dir)
    server.start()
    try:
        yield server
    finally:
        server.kill()
