"""One server process, ours or somebody else's: started with a log file, watched until it is ready, ended by its pid.

On Linux it gets SIGTERM when the process that started it dies, however that happens.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LOOPBACK = "127.0.0.1"
_PORTS = range(10_240, 32_768)
_POLL_S = 0.02
_LOG_TAIL_BYTES = 2000
_DIE_WITH_PARENT = Path(__file__).with_name("die_with_parent.py")
_STARTER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="server-starter")
"""Starts every server, because the kernel takes the end of the thread that started one for the parent's death."""


class ServerStartError(RuntimeError):
    """A server ended, or was not ready in time; the message ends with the last lines of its log."""


def free_port() -> int:
    """Return a TCP port that no server listens on.

    It lies below the range of outgoing connections, one of which could take it before its server does.
    """
    while True:
        port = _PORTS[secrets.randbelow(len(_PORTS))]
        with socket.socket() as listener, suppress(OSError):
            listener.bind((LOOPBACK, port))
            return port


class ServerProcess:
    """A child process that outlives neither ``stop`` nor this process."""

    def __init__(self, name: str, log: Path) -> None:
        self._name = name
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, f"{self._name} was not started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True from ``start`` until the process ends, for whatever reason."""
        return self._process is not None and self._process.poll() is None

    def start(
        self,
        command: Sequence[str | Path],
        *,
        ready: Callable[[], bool],
        timeout_s: float,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Runs the command in a session of its own and returns once ``ready`` says so; its log is appended to.

        Args:
            command: Program, as an absolute path, and arguments.
            ready: Polled; an ``OSError`` from it means "not yet".
            timeout_s: Deadline for becoming ready.
            env: Environment of the process; none: this process's own.

        Raises:
            ServerStartError: If the process ends or the deadline passes first; nothing is left running then.
        """
        assert not self.alive, f"{self._name} runs already"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            log_start = log.tell()
            self._process = _STARTER.submit(
                subprocess.Popen,
                _tied(command),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C at the terminal is for us to pass on, in our order
            ).result()
        try:
            self._wait_until_ready(ready, timeout_s, log_start)
        except BaseException:
            self.kill()
            raise

    def stop(self, grace_s: float) -> None:
        """Ends the process: SIGTERM, and SIGKILL if it is still there after ``grace_s`` seconds."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Ends the process, and whatever it has started, with SIGKILL."""
        if self._process is None or self._process.poll() is not None:
            return
        os.killpg(self._process.pid, signal.SIGKILL)  # leads its own group, and keeps the id until it is waited for
        self._process.wait()

    def _wait_until_ready(self, ready: Callable[[], bool], timeout_s: float, log_start: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + timeout_s
        while not _holds(ready):
            code = self._process.poll()
            if code is not None:
                raise ServerStartError(f"{self._name} ended with status {code}{self._said(log_start)}")
            if time.monotonic() > deadline:
                raise ServerStartError(f"{self._name} was not ready within {timeout_s:g} s{self._said(log_start)}")
            time.sleep(_POLL_S)

    def _said(self, log_start: int) -> str:
        with self._log.open("rb") as log:
            log.seek(max(log_start, self._log.stat().st_size - _LOG_TAIL_BYTES))
            said = log.read().decode(errors="replace").strip()
        return f"; {self._log} ends with:\n{said}" if said else f"; {self._log} is empty"


class ManagedServer(ABC):
    """A server that knows its own command and keeps its ports and files over ``stop`` and ``start``."""

    def __init__(self, process: ServerProcess, *, stop_grace_s: float) -> None:
        self._process = process
        self._stop_grace_s = stop_grace_s

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while the process runs; what it serves may be dead all the same."""
        return self._process.alive

    @abstractmethod
    def start(self) -> None:
        """Runs the server and returns once it is ready.

        Raises:
            ServerStartError: If it does not come up; the message ends with its log.
        """

    def stop(self) -> None:
        """Lets the server finish what it has in hand, then ends it."""
        self._process.stop(self._stop_grace_s)

    def kill(self) -> None:
        """Ends the server with SIGKILL."""
        self._process.kill()


def _tied(command: Sequence[str | Path]) -> list[str]:
    words = [str(word) for word in command]
    if sys.platform != "linux":
        return words
    return [sys.executable, "-I", "-S", str(_DIE_WITH_PARENT), str(os.getpid()), *words]


def _holds(ready: Callable[[], bool]) -> bool:
    try:
        return ready()
    except OSError:
        return False
