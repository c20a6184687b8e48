"""A Triton server on loopback, for development and tests: the CPU build inside the `nvidia-pytriton` wheel.

Only the server binary and its Python backend are used, on a model repository of ours. Production runs NVIDIA's own,
current image: the wheel's server is of 2024 and has known vulnerabilities, so it is never made to listen elsewhere.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import uuid
from pathlib import Path
from typing import Any

from jest_server.local.process import LOOPBACK, ManagedServer, ServerProcess, ServerStartError, free_port

STOP_GRACE_S = 15.0
"""Triton finishes requests in hand and ends its backends; two torch models take up to six seconds."""
_PROBE_TIMEOUT_S = 1.0
_EXIT_TIMEOUT_S = 5
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Triton's Python backend keeps its regions, not a file of ours
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class TritonServer(ManagedServer):
    """One server on one model repository; it keeps its ports over ``stop`` and ``start``."""

    def __init__(self, repository: Path, work_dir: Path, *, start_timeout_s: float = 60.0) -> None:
        """Prepares a server that is not started yet.

        Args:
            repository: The model repository; every model in it is loaded.
            work_dir: Holds the log, and the backend's folder while the server runs; made if absent.
            start_timeout_s: Deadline for all models being loaded.
        """
        super().__init__(ServerProcess("tritonserver", work_dir / "triton.log"), stop_grace_s=STOP_GRACE_S)
        self._repository = repository
        self._backends = work_dir / "triton-backends"
        self._start_timeout_s = start_timeout_s
        self._ports = {"http": 0, "grpc": 0, "metrics": 0}
        self._id = f"jest-{uuid.uuid4().hex}"

    @staticmethod
    def available() -> str | None:
        """Tells why Triton cannot run here; None if it can."""
        folder = _distribution()
        if folder is None:
            return "the nvidia-pytriton package is not installed; it exists for Linux on x86-64"
        stub = _stub(folder)
        if not stub.exists():
            return f"nvidia-pytriton has no Python backend for Python {_PYTHON}"
        # Triton waits for ever for a backend process that the dynamic linker could not start.
        linked = subprocess.run(["ldd", stub], env=_environment(), capture_output=True, text=True, check=False)  # noqa: S603, S607 - the system's own tool on a file of the wheel
        lacking = [line.strip() for line in (linked.stdout + linked.stderr).splitlines() if "not found" in line]
        if lacking:
            return f"Triton's Python backend cannot be loaded ({'; '.join(lacking)}): install libpython{_PYTHON}"
        return None

    @property
    def grpc_url(self) -> str:
        """Host and port of the gRPC endpoint."""
        return f"{LOOPBACK}:{self._ports['grpc']}"

    @property
    def metrics_url(self) -> str:
        """Where Prometheus metrics are."""
        return f"http://{LOOPBACK}:{self._ports['metrics']}/metrics"

    def start(self) -> None:
        """Runs the server and returns once every model is loaded.

        Raises:
            ServerStartError: If Triton is not available here, or a model cannot be loaded; the message has the log's
                last lines.
        """
        problem = self.available()
        if problem:
            raise ServerStartError(f"cannot start Triton: {problem}")
        folder = _distribution()
        assert folder is not None
        self._remove_traces()
        self._link_backend(folder)
        self._ports = {name: port or free_port() for name, port in self._ports.items()}
        try:
            self._process.start(
                self._command(folder), ready=self._loaded, timeout_s=self._start_timeout_s, env=_environment()
            )
        except BaseException:
            self._remove_traces()
            raise

    def stop(self) -> None:
        """Lets requests in hand finish, ends the server, and removes its shared memory and its backend's folder."""
        super().stop()
        self._remove_traces()

    def kill(self) -> None:
        """Ends the server and its backends with SIGKILL, and removes what they leave behind."""
        super().kill()
        self._remove_traces()

    def _command(self, folder: Path) -> list[str | Path]:
        listening = [
            option
            for name, port in self._ports.items()
            for option in (f"--{name}-address={LOOPBACK}", f"--{name}-port={port}")
        ]
        return [
            folder / "bin" / "tritonserver",
            f"--id={self._id}",
            f"--model-repository={self._repository}",
            f"--backend-directory={self._backends}",
            f"--backend-config=python,shm-region-prefix-name={self._id}",
            *listening,
            "--model-control-mode=explicit",  # so that a dead model can be loaded again
            "--load-model=*",
            "--disable-auto-complete-config",  # would start each backend twice
            "--allow-gpu-metrics=false",
            f"--exit-timeout-secs={_EXIT_TIMEOUT_S}",
        ]

    def _link_backend(self, folder: Path) -> None:
        """Puts the backend together, which the wheel keeps in parts; by links, as the parts find libraries by path."""
        target = self._backends / "python"
        target.mkdir(parents=True)
        for part in (*(folder / "backends" / "python").glob("*.*"), _stub(folder)):
            (target / part.name).symlink_to(part)

    def _remove_traces(self) -> None:
        shutil.rmtree(self._backends, ignore_errors=True)
        for region in _SHARED_MEMORY.glob(f"{self._id}*"):
            region.unlink(missing_ok=True)

    def _loaded(self) -> bool:
        # Somebody else's server on a port that we lost a race for answers too: the id tells.
        return self._get("/v2").get("name") == self._id and "error" not in self._get("/v2/health/ready")

    def _get(self, path: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection(LOOPBACK, self._ports["http"], timeout=_PROBE_TIMEOUT_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return dict(json.loads(answer.read() or b"{}")) if answer.status == http.HTTPStatus.OK else {"error": ""}
        except (http.client.HTTPException, ValueError) as error:
            raise ConnectionError(f"no Triton answers: {error!r}") from error
        finally:
            connection.close()


def _distribution() -> Path | None:
    """Finds the wheel's folder without importing it: its Python package is not needed and heavy."""
    spec = importlib.util.find_spec("pytriton")
    folders = [Path(place) / "tritonserver" for place in (spec.submodule_search_locations or ())] if spec else []
    return next((folder for folder in folders if folder.is_dir()), None)


def _stub(folder: Path) -> Path:
    return folder / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"


def _environment() -> dict[str, str]:
    """This process's own, with this interpreter first: the backend takes `python3` from the PATH to find packages."""
    environment = dict(os.environ)
    _prepend(environment, "PATH", str(Path(sys.executable).parent))
    libraries = Path(sysconfig.get_config_var("LIBDIR") or "")
    if (libraries / f"libpython{_PYTHON}.so.1.0").exists():
        _prepend(environment, "LD_LIBRARY_PATH", str(libraries))
    return environment


def _prepend(environment: dict[str, str], name: str, folder: str) -> None:
    rest = environment.get(name)
    environment[name] = f"{folder}{os.pathsep}{rest}" if rest else folder
