"""Attempts: the runs of a job's training loop, which give super-batch ids their first part."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from jest_server.domain.errors import AttemptSuperseded, AttemptUnknown


@dataclass(frozen=True)
class AttemptRequest:
    """One rank's call to join the run that its process belongs to."""

    job: str
    rank: int
    world_size: int
    launch: str
    """Equal on all ranks of one start, and on no other start; empty: the server gathers the ranks."""
    process_nonce: str
    parent: str = ""
    """The attempt that this one continues; empty: none."""
    parent_step: int | None = None

    @property
    def origin(self) -> tuple[int, str, int | None]:
        """Return what must be the same on all ranks of an attempt."""
        return self.world_size, self.parent, self.parent_step


class OpenStatus(enum.Enum):
    """What became of a call to open an attempt."""

    OPENED = "opened"
    JOINED = "joined"
    SUPERSEDED = "superseded"
    """A newer process has opened the next attempt."""
    MISMATCH = "mismatch"
    """Another rank joined this attempt with another world size, parent or parent step."""
    UNKNOWN_PARENT = "unknown_parent"


@dataclass(frozen=True)
class OpenResult:
    """The attempt that a call was about, or the job's current one, and the rank that opened it."""

    status: OpenStatus
    attempt: str
    opened_by: int
    origin: tuple[int, str, int | None]


def attempt_name(number: int) -> str:
    """Return the name of a job's attempt; attempts are numbered from 1."""
    return f"a{number}"


def attempt_number(super_batch_id: str) -> int:
    """Return the number of the attempt that a super-batch belongs to; 0 if its id names none."""
    name = super_batch_id.partition("-")[0]
    return int(name[1:]) if name[:1] == "a" and name[1:].isdecimal() and name.isascii() else 0


def attempt_unknown(job: str, attempt: str, metadata: dict[str, str]) -> AttemptUnknown:
    """Return the error for an attempt that the job never opened."""
    return AttemptUnknown(
        f"job {job!r} has no attempt {attempt!r}; open one first (OpenAttempt)", metadata | {"attempt": attempt}
    )


def attempt_superseded(job: str, current: str, opened_by: int, metadata: dict[str, str]) -> AttemptSuperseded:
    """Return the error for a process that belongs to an attempt before the current one."""
    return AttemptSuperseded(
        f"a newer process of rank {opened_by} opened attempt {current!r} of job {job!r}: this process belongs to an "
        "earlier attempt and has to end, or its ranks have to be started again together",
        metadata | {"attempt": current, "opened_by": str(opened_by)},
    )
