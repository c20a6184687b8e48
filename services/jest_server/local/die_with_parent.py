"""Runs a command that gets SIGTERM when the process that started it dies: `die_with_parent.py PARENT_PID COMMAND...`.

A program of its own, executed between fork and the command, because Python code may not safely run between fork and
exec in a process that has threads (gRPC starts some). Linux only; it imports nothing of the package, to start at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>; survives exec


def main() -> None:
    """Asks the kernel for the signal, then becomes the command; the process id stays the same."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the kernel was asked
        sys.exit(f"parent {parent} is gone, {command[0]} is not started")
    os.execv(command[0], command)  # noqa: S606 - the command is the caller's, run without a shell


if __name__ == "__main__":
    main()
