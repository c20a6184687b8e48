"""One of our own processes as a child: ready when its health check says SERVING."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from jest_server.local.process import LOOPBACK, ManagedServer, ServerProcess, free_port
from jest_server.runtime.health_check import serves

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

START_TIMEOUT_S = 60.0
STOP_GRACE_S = 20.0
_CHECK_TIMEOUT_S = 1.0


class JestProcess(ManagedServer):
    """Runs ``python -m MODULE`` with JEST_* settings on ports that stay the same over restarts."""

    def __init__(self, name: str, module: str, log: Path, settings: Mapping[str, object], *, port: int = 0) -> None:
        super().__init__(ServerProcess(name, log), stop_grace_s=STOP_GRACE_S)
        self._module = module
        self._settings = settings
        self.port = port or free_port()
        self.metrics_port = free_port()

    def start(self) -> None:
        """Runs the process and returns once it serves.

        Raises:
            ServerStartError: If it does not come up; the message ends with its log.
        """
        settings = {
            "listen": f"{LOOPBACK}:{self.port}",
            "metrics_listen": f"{LOOPBACK}:{self.metrics_port}",
            **self._settings,
        }
        env = os.environ | {f"JEST_{name.upper()}": str(value) for name, value in settings.items()}
        command = [sys.executable, "-m", self._module]
        self._process.start(command, ready=self._serves, timeout_s=START_TIMEOUT_S, env=env)

    def _serves(self) -> bool:
        return serves(f"{LOOPBACK}:{self.port}", _CHECK_TIMEOUT_S)[0]


class JestHttpProcess(JestProcess):
    """The same for a process that speaks HTTP in plain text: ready when ``/readyz`` says so."""

    def _serves(self) -> bool:
        return serves(f"http://{LOOPBACK}:{self.port}/readyz", _CHECK_TIMEOUT_S)[0]
