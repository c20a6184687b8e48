"""A job's attempts, in this process's memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from jest_server.domain.attempts import AttemptRequest, OpenResult, OpenStatus, attempt_name, attempt_number


@dataclass
class Current:
    """The attempt that a job runs in."""

    origin: tuple[int, str, int | None] = (0, "", None)
    launch: str = ""
    opened_by: int = 0
    nonces: dict[int, str] = field(default_factory=dict)
    decided: bool = False


class Attempts:
    """Which process belongs to which attempt."""

    def __init__(self) -> None:
        self.number = 0
        self.current = Current()
        self._processes: dict[str, int] = {}
        self._launches: dict[str, int] = {}

    def open(self, request: AttemptRequest) -> OpenResult:
        """Join a process to the current attempt, or open the next one."""
        status = self._status(request)
        if status is OpenStatus.OPENED:
            self._open(request)
        if status in (OpenStatus.OPENED, OpenStatus.JOINED):
            self.current.nonces[request.rank] = request.process_nonce
            self._processes[request.process_nonce] = self.number
        return OpenResult(status, attempt_name(self.number), self.current.opened_by, self.current.origin)

    def _status(self, request: AttemptRequest) -> OpenStatus:  # noqa: PLR0911 - one for each case
        current, same = self.current, request.origin == self.current.origin
        if request.parent and not 1 <= attempt_number(request.parent) <= self.number:
            return OpenStatus.UNKNOWN_PARENT
        if request.process_nonce in self._processes:
            newest = self._processes[request.process_nonce] == self.number
            if not newest or current.nonces.get(request.rank) != request.process_nonce:
                return OpenStatus.SUPERSEDED
            return OpenStatus.JOINED if same else OpenStatus.MISMATCH
        if request.launch:
            number = self._launches.get(request.launch)
            if number is None:
                return OpenStatus.OPENED
            if number < self.number:
                return OpenStatus.SUPERSEDED
            return OpenStatus.JOINED if same else OpenStatus.MISMATCH
        sealed = len(current.nonces) == current.origin[0]
        if self.number == 0 or current.launch or sealed or not same:
            return OpenStatus.OPENED
        return OpenStatus.JOINED

    def _open(self, request: AttemptRequest) -> None:
        if not self.current.decided:
            for nonce in self.current.nonces.values():
                self._processes.pop(nonce, None)
        self.number += 1
        self.current = Current(request.origin, request.launch, request.rank)
        if request.launch:
            self._launches[request.launch] = self.number
