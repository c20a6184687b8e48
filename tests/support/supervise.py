"""Runs a command and leaves none of its processes behind: `python supervise.py COMMAND...`.

Servers end with the process that started them (`jest_server.local.die_with_parent`), but what a test starts otherwise,
or has stopped with SIGSTOP, does not. On Linux, the kernel gives this process every descendant whose parent has died,
whatever its session or its title, so that all of them are found when the command ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # <sys/prctl.h>
EXIT_S = 5.0
"""How long the processes that are left may take to end by themselves."""


def main(command: list[str]) -> int:
    """Run the command until it ends, kill what is left, and return the command's exit status."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    process = subprocess.Popen(command)
    signal.signal(signal.SIGINT, lambda *_: None)  # from a terminal, the command has got it too
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while (ended := os.wait())[0] != process.pid:
        pass
    status = os.waitstatus_to_exitcode(ended[1])
    killed = kill_descendants()
    if killed:
        sys.stderr.write(f"killed processes that were left: {'; '.join(sorted(killed))}\n")
    return 128 - status if status < 0 else status


def kill_descendants() -> set[str]:
    """Wait for all descendants to end, kill those that do not, and return their command lines."""
    killed = set()
    deadline = time.monotonic() + EXIT_S
    while left := [process for process in psutil.Process().children(recursive=True) if not _reaped(process.pid)]:
        if time.monotonic() > deadline:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    killed.add(" ".join(process.cmdline()) or process.name())
                    process.kill()
        time.sleep(0.02)
    return killed


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # not a child, but a child's child: it becomes one when its parent has ended
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
