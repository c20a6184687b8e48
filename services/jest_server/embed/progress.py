"""How far `jest-server embed` is: a bar where somebody looks at a terminal, log lines otherwise."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from jest_server.runtime.logs import get_logger

_LOG_S = 30.0
_log = get_logger()


class Progress:
    """Counts shards and rows, from one thread."""

    def __init__(self, shards: int, *, bar: bool | None = None) -> None:
        """Args.

        shards: How many there are to do.
        bar: Whether to draw; none: if standard error is a terminal.
        """
        self._shards = shards
        self._done = 0
        self._rows = 0
        self._started_s = self._told_s = time.monotonic()
        self._bar = Bar(
            TextColumn("{task.fields[rows]:,} examples, {task.fields[rate]:,.0f}/s"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("shards"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (sys.stderr.isatty() if bar is None else bar),
        )
        self._task = self._bar.add_task("", total=shards, rows=0, rate=0.0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def rows_done(self, count: int) -> None:
        """Counts examples that are embedded."""
        self._rows += count
        self._tell()

    def shard_done(self) -> None:
        """Counts a shard that is written, was there, or failed."""
        self._done += 1
        self._tell()

    def _tell(self) -> None:
        now_s = time.monotonic()
        rate = self._rows / max(now_s - self._started_s, 1e-9)
        self._bar.update(self._task, completed=self._done, rows=self._rows, rate=rate)
        if self._bar.disable and now_s - self._told_s >= _LOG_S:
            self._told_s = now_s
            _log.info("embedding", rows=self._rows, per_s=round(rate), shards=f"{self._done} of {self._shards}")
