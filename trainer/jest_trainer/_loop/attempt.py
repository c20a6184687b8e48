"""The run of a training loop that this process belongs to: opened on the server when the loop's first pass begins."""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from typing import TYPE_CHECKING

from jest_trainer._loop.distributed import resolve_launch

if TYPE_CHECKING:
    from jest_trainer.errors import JestError
    from jest_trainer.job import Job

_opened: Counter[tuple[str, str]] = Counter()
"""Attempts that this process opened, by job and launch: a second loop in one start is an attempt of its own."""


class LoopAttempt:
    """Names super-batches `{attempt}-{pass}-{step}`, equal on all ranks and different on every start.

    Args:
        job: whose loop it is.
        rank: this process's.
        launch: equal on all ranks of one start and on no other start; None asks torch.distributed and the scheduler.
    """

    def __init__(self, job: Job, rank: int, launch: str | None) -> None:
        self._job = job
        self._rank = rank
        self._wanted_launch = launch
        self._lock = threading.Lock()
        self.resume("", None)

    @property
    def name(self) -> str:
        """The attempt, or the one that it is going to continue; empty before the first."""
        return self._name or self._parent

    def resume(self, parent: str, step: int | None) -> None:
        """Let the next pass open a new attempt, which continues `parent` at a step."""
        self._parent, self._parent_step = parent, step
        self._name = ""
        self._passes = 0
        self._decided = False
        self._nonce = secrets.token_hex(16)

    def begin_pass(self) -> int:
        """Return the number of a new pass; the first opens the attempt, by a collective where ranks have one."""
        if not self._name:
            launch = resolve_launch(self._wanted_launch, self._job.world_size)
            if launch:
                nth = _opened[self._job.name, launch]
                _opened[self._job.name, launch] += 1
                launch = f"{launch}/{nth}"
            self._launch = launch
            self._open()
        number = self._passes
        self._passes += 1
        return number

    def super_batch_id(self, pass_number: int, step: int) -> str:
        """The super-batch of a step."""
        return f"{self._name}-{pass_number}-{step}"

    def decided(self) -> None:
        """Note that a decision was made: this attempt is part of what the model was trained on."""
        self._decided = True

    def join_newer(self, superseded: str, error: JestError) -> None:
        """Join the attempt that took the place of one in which nothing was decided.

        Happens while ranks are started again one by one: a rank may first be put together with processes that are gone.

        Args:
            superseded: the super-batch id that was refused.
            error: the refusal, raised if something was decided already.
        """
        with self._lock:
            if not superseded.startswith(f"{self._name}-"):
                return  # another thread has done it
            if self._decided:
                raise error
            self._open()

    def _open(self) -> None:
        self._name = self._job.open_attempt(
            self._rank,
            launch=self._launch,
            parent=self._parent,
            parent_step=self._parent_step,
            process_nonce=self._nonce,
        )
