"""How long a selector keeps those waiting who ask whether it is well."""

from __future__ import annotations

import threading
import time
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

INTERVAL_S = 0.01
TIMEOUT_S = 10.0


class HealthProbe:
    """Asks for the selector's health every 10 ms over a channel of its own, from a thread, for the length of a block.

    An answer that is late delays the next question by as much, and no more: none is left out because of another. How
    much later than asked for the probe itself is woken tells what of a latency may be the machine's doing.
    """

    def __init__(self, address: str) -> None:
        self.latencies_s: list[float] = []
        self.oversleeps_s: list[float] = []
        self._channel = grpc.insecure_channel(address)
        self._check = health_pb2_grpc.HealthStub(self._channel).Check
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="health-probe", daemon=True)
        self._failure: grpc.RpcError | None = None

    @property
    def worst_s(self) -> float:
        """The longest that an answer took so far."""
        return max(self.latencies_s, default=0.0)

    def __enter__(self) -> Self:
        self._check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)  # connecting is not what is measured
        self._thread.start()
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._channel.close()
        if self._failure is not None and failed is None:
            raise self._failure

    def _ask(self) -> None:
        try:
            asleep = time.perf_counter()
            while not self._stop.wait(INTERVAL_S):
                started = time.perf_counter()
                self.oversleeps_s.append(started - asleep - INTERVAL_S)
                self._check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
                asleep = time.perf_counter()
                self.latencies_s.append(asleep - started)
        except grpc.RpcError as error:
            self._failure = error
