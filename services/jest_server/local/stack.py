"""The whole stack on one machine: real servers where they are installed, named stand-ins where not.

Valkey (from its wheel) or `redis-server` holds queue and cache, Triton (from its wheel) the reference model;
selector, scorer and control are separate processes. A server that dies is started again, on the same port and with
the same files.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import typer

from jest_server.domain.errors import ReferenceModelError
from jest_server.local.jest_process import JestHttpProcess, JestProcess
from jest_server.local.process import LOOPBACK, ServerStartError
from jest_server.local.triton_server import TritonServer
from jest_server.local.valkey_server import ValkeyServer
from jest_server.reference.config import reference_info
from jest_server.reference.repository import read_config
from jest_server.runtime.console import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jest_server.local.process import ManagedServer

WATCH_S = 0.2
START_ATTEMPTS = 5
"""Failed attempts to start a server again after which the whole stack ends."""


class Stack:
    """Parts that start in order, are watched while they run, and stop in the opposite order."""

    def __init__(
        self,
        model_repository: Path,
        *,
        reference_model: str = "jest_reference",
        port: int = 0,
        data_dir: Path | None = None,
        on_event: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Args.

        model_repository: Triton model repository with the reference model and its encoders.
        reference_model: Name of the reference model there.
        port: Port of the selector; 0 takes a free one.
        data_dir: Logs and the queue's files; none: a temporary folder that goes with the stack.
        on_event: Told in a sentence what starts, dies and stops.
        """
        self._own_data_dir = data_dir is None
        self.data_dir = data_dir or Path(tempfile.mkdtemp(prefix="jest-server-"))
        self._on_event = on_event
        self._restarts: Counter[str] = Counter()
        self._stopping = threading.Event()
        self._changing = threading.Lock()
        self._watcher: threading.Thread | None = None
        self.failure: ServerStartError | None = None
        self.stand_ins: list[str] = []
        self.servers: dict[str, ManagedServer] = {}
        self.triton: TritonServer | None = None
        self._model_repository = model_repository
        self._reference_model = reference_model
        self._port = port
        self._choose_servers()

    @property
    def address(self) -> str:
        """Where trainers connect."""
        return f"{LOOPBACK}:{self.selector.port}"

    def start(self) -> None:
        """Start every server and wait until each is ready.

        Raises:
            ServerStartError: If a server does not come up; nothing is left running then.
        """
        self._check_repository()
        try:
            for name, server in self.servers.items():
                self._start(name, server)
            for name, server in self._jest_processes().items():
                self.servers[name] = server
                self._start(name, server)
        except BaseException:
            self.stop()
            raise
        self._watcher = threading.Thread(target=self._watch, name="stack-watch", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """Drain and end every server, the last started first, and remove temporary files."""
        self._stopping.set()
        with self._changing:
            for name, server in reversed(self.servers.items()):
                server.stop()
                self._on_event(f"{name} stopped")
        if self._watcher is not None:
            self._watcher.join()
        if self._own_data_dir:
            shutil.rmtree(self.data_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def kill(self, name: str) -> None:
        """End a server with SIGKILL, as a crash would; it is started again."""
        self.servers[name].kill()

    @contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Suspend a server (SIGSTOP) for the length of the block."""
        pid = self.servers[name].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def restarts(self, name: str) -> int:
        """Return how often a server was started again."""
        return self._restarts[name]

    def wait(self) -> None:
        """Block until a server could not be started again."""
        self._stopping.wait()
        if self.failure is not None:
            raise self.failure

    def endpoints(self) -> dict[str, str]:
        """Returns what listens where."""
        found = {
            "selector (gRPC)": self.address,
            "selector metrics": f"http://{LOOPBACK}:{self.selector.metrics_port}/metrics",
            "scorer metrics": f"http://{LOOPBACK}:{self.scorer.metrics_port}/metrics",
            "control (REST)": f"http://{LOOPBACK}:{self.control.port}/v1/jobs",
            "queue and cache": self.valkey.url,
        }
        if self.triton is not None:
            found["Triton (gRPC)"] = self.triton.grpc_url
            found["Triton metrics"] = self.triton.metrics_url
        return found

    def _choose_servers(self) -> None:
        self.servers["valkey"] = self.valkey = ValkeyServer(self.data_dir / "valkey")
        no_triton = TritonServer.available()
        if no_triton is None:
            self.servers["triton"] = self.triton = TritonServer(self._model_repository, self.data_dir)
        else:
            self.stand_ins.append(f"the reference model runs inside the scorer, because {no_triton}")

    def _check_repository(self) -> None:
        """Finds what would otherwise only show as a scorer that never gets ready."""
        try:
            reference_info(read_config(self._model_repository, self._reference_model))
        except ReferenceModelError as error:
            raise ServerStartError(f"the model repository cannot be served: {error}") from error

    def _jest_processes(self) -> dict[str, JestProcess]:
        """Return the server's own processes in the order to start them, now that the other servers' ports are known."""
        log = self.data_dir
        shared: dict[str, object] = {"drain_delay_s": 0}
        scoring: dict[str, object] = {
            "reference_model": self._reference_model,
            "reclaim_idle_s": 2,
            "announce_interval_s": 1,
        }
        if self.triton is None:
            scoring |= {"reference_backend": "in_process", "model_repository": self._model_repository}
        else:
            scoring |= {"triton_url": self.triton.grpc_url}
        shared |= {"queue_url": f"{self.valkey.url}/0", "cache_url": f"{self.valkey.url}/1"}
        self.scorer = JestProcess("scorer", "jest_server.scorer", log / "scorer.log", shared | scoring)
        self.selector = JestProcess("selector", "jest_server.selector", log / "selector.log", shared, port=self._port)
        self.control = JestHttpProcess("control", "jest_server.control", log / "control.log", shared)
        return {"scorer": self.scorer, "selector": self.selector, "control": self.control}

    def _start(self, name: str, server: ManagedServer) -> None:
        server.start()
        self._on_event(f"{name} started")

    def _watch(self) -> None:
        while not self._stopping.wait(WATCH_S):
            for name, server in self.servers.items():
                with self._changing:
                    if not server.alive and not self._stopping.is_set():
                        self._on_event(f"{name} died")
                        self._restart(name, server)

    def _restart(self, name: str, server: ManagedServer) -> None:
        self._restarts[name] += 1
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self._start(name, server)
            except ServerStartError as error:
                self._on_event(f"{name} did not start (attempt {attempt} of {START_ATTEMPTS}): {error}")
                self.failure = error
                if self._stopping.wait(attempt * WATCH_S):
                    return
            else:
                self.failure = None
                return
        self._stopping.set()


def run_until_interrupted(*, model_repository: Path, listen: str, reference_model: str, data_dir: Path | None) -> None:
    """Start the stack, print where it listens and which stand-ins it uses, and drain on SIGINT or SIGTERM.

    Raises:
        typer.Exit: With status 1 if a server does not come up.
        typer.BadParameter: If ``listen`` is not a port on loopback.
    """
    host, _, port = listen.rpartition(":")
    if host not in {LOOPBACK, "localhost"} or not port.isdecimal():
        raise typer.BadParameter(f"is {listen!r}, expected {LOOPBACK}:PORT: the embedded stack stays on this machine")
    stack = Stack(model_repository, reference_model=reference_model, port=int(port), data_dir=data_dir, on_event=say)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # SIGINT as well: a shell script's background processes start with it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        with stack:
            say("")
            for what, where in stack.endpoints().items():
                say(f"{what:<18} {where}")
            for stand_in in stack.stand_ins:
                say(f"stand-in: {stand_in}")
            say(f"{'logs':<18} {stack.data_dir}\n\nready; Ctrl-C drains and ends everything")
            stack.wait()
    except KeyboardInterrupt:
        say("all ended")
    except ServerStartError as error:
        say(str(error))
        raise typer.Exit(1) from error
