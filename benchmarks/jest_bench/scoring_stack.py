"""Everything between a job and the reference model, to measure: queue, cache, Triton, selector and scorers."""

from __future__ import annotations

import shutil
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from prometheus_client.parser import text_string_to_metric_families

from jest_server.local.jest_process import JestProcess
from jest_server.local.process import LOOPBACK, ServerStartError
from jest_server.local.triton_server import TritonServer
from jest_server.local.valkey_server import ValkeyServer, executables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jest_server.local.process import ManagedServer

REFERENCE_MODEL = "jest_reference"
NEVER_AGAIN_S = 3600.0
"""Between probes of the reference model: the first is before anything is counted, and there shall be no other."""
METRICS_TIMEOUT_S = 10.0
COUNT = "nv_inference_count"


class ScoringStack:
    """Starts its parts in order and stops them in the opposite one; a context manager.

    Args:
        model_repository: with the reference model ``jest_reference``.
        scorers: how many scorer processes.
        settings: of the scorers.
        selector_settings: of the selector.
        cache_bytes: memory of the cache, which evicts beyond it; 0: as much as it takes.

    Raises:
        ServerStartError: If a part does not come up.
    """

    def __init__(
        self,
        model_repository: Path,
        *,
        scorers: int,
        settings: Mapping[str, object] | None = None,
        selector_settings: Mapping[str, object] | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="jest-bench-"))
        name, executable = next(iter(executables().items()))
        self.stands_on = f"queue and cache in {name.capitalize()}"
        self.queue = ValkeyServer(self.folder / "queue", executable=executable, append_only=False)
        self.cache = ValkeyServer(
            self.folder / "cache",
            executable=executable,
            append_only=False,
            max_memory_policy="allkeys-lru",
            max_memory_bytes=cache_bytes,
        )
        self.triton = TritonServer(model_repository, self.folder)
        self.scorers: list[JestProcess] = []
        self._scorer_count = scorers
        self._scorer_settings = settings or {}
        self._selector_settings = selector_settings or {}
        self._exit = ExitStack()

    @property
    def queue_url(self) -> str:
        """Redis of the queue."""
        return f"{self.queue.url}/0"

    @property
    def cache_url(self) -> str:
        """Redis of the cache."""
        return f"{self.cache.url}/0"

    @property
    def address(self) -> str:
        """Where the selector listens."""
        return f"{LOOPBACK}:{self.selector.port}"

    def __enter__(self) -> Self:
        self._exit.callback(shutil.rmtree, self.folder, ignore_errors=True)
        try:
            self._start(self.queue)
            self._start(self.cache)
            self._start(self.triton)
            shared = {"queue_url": self.queue_url, "cache_url": self.cache_url, "drain_delay_s": 0}
            for number in range(self._scorer_count):
                scoring = {"triton_url": self.triton.grpc_url, "announce_interval_s": NEVER_AGAIN_S}
                scoring |= {"fingerprint_interval_s": NEVER_AGAIN_S}  # its inferences would be counted with the rest
                scoring |= {"reference_model": REFERENCE_MODEL, "consumer": f"scorer-{number}"}
                log = self.folder / f"scorer-{number}.log"
                settings = {**shared, **scoring, **self._scorer_settings}
                self.scorers.append(JestProcess(f"scorer-{number}", "jest_server.scorer", log, settings))
                self._start(self.scorers[-1])
            settings = {**shared, **self._selector_settings}
            self.selector = JestProcess("selector", "jest_server.selector", self.folder / "selector.log", settings)
            self._start(self.selector)
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def inferences(self) -> int:
        """Examples that Triton has embedded, as it counts them itself."""
        url = self.triton.metrics_url
        with urllib.request.urlopen(url, timeout=METRICS_TIMEOUT_S) as answer:  # noqa: S310 - our own, on loopback
            families = text_string_to_metric_families(answer.read().decode())
        samples = (sample for family in families for sample in family.samples)
        counts = [s.value for s in samples if s.name.startswith(COUNT) and s.labels.get("model") == REFERENCE_MODEL]
        return int(sum(counts))

    def _start(self, part: ManagedServer) -> None:
        self._exit.callback(part.stop)
        try:
            part.start()
        except ServerStartError as error:
            error.add_note(f"Triton {'runs' if self.triton.alive else 'does not run'}")
            raise
