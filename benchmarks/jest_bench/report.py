"""What every benchmark needs: fair turns, peak memory, the machine in words, and tables."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import re
import statistics
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.connection import Connection

PACKAGES = ("jest-server", "torch", "numpy", "grpcio")
_KIB = 1024


@dataclass(frozen=True)
class Peak:
    """The most memory that some work needed, in bytes."""

    used: int
    """Beyond what the process held before: inputs, libraries and interpreter do not count."""
    process: int
    """Of the whole process."""


def machine() -> dict[str, Any]:
    """Describes this machine in words, with the versions that matter."""
    import torch  # noqa: PLC0415 - a description does not decide who may import this module

    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _meminfo("MemTotal"),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def describe(found: Mapping[str, Any]) -> str:
    """Says in one sentence what ``machine`` found."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    memory = f"{found['memory_bytes'] / 2**30:.0f} GiB"
    return (
        f"{found['cores']} cores of {found['cpu']} ({found['cpu_capability']}), {memory}, {found['threads']} threads, "
        f"{found['system']}, Python {found['python']}, {versions}."
    )


def alternate(works: Mapping[str, Callable[[], object]], *, runs: int) -> dict[str, float]:
    """Times each work ``runs`` times, taking turns after one round that does not count.

    Returns:
        The median of each, in seconds. What slows the machine down for a while slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(runs + 1):
        for name, work in works.items():
            gc.collect()
            started = time.perf_counter()
            result = work()
            elapsed = time.perf_counter() - started
            del result
            if turn:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(prepare: Callable[..., Callable[[], object]], *arguments: object) -> Peak:
    """Runs the work that ``prepare(*arguments)`` returns once in a fresh process, and reads its peak from the kernel.

    Args:
        prepare: a module's function, so that another process can import it; what it does is not counted.
        *arguments: what it is called with.

    Raises:
        RuntimeError: If the process ended without an answer.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run_and_tell, args=(theirs, prepare, arguments))
    process.start()
    theirs.close()
    try:
        peak: Peak = ours.recv()
    except EOFError:
        raise RuntimeError(f"the process that was to be measured ended with exit code {process.exitcode}") from None
    finally:
        process.join()
    return peak


def resident_bytes(pid: int) -> int:
    """Memory that a process and its descendants have in RAM; what they share counts for each of them."""
    total = _field(Path(f"/proc/{pid}/status"), "VmRSS")
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        total += sum(resident_bytes(int(child)) for child in children.read_text().split())
    return total


def free_memory() -> int:
    """Bytes that could be allocated now without swapping."""
    return _meminfo("MemAvailable")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Renders a table, the first column to the left and numbers to the right."""
    lines = [header, ["---", *("--:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _run_and_tell(
    pipe: Connection, prepare: Callable[..., Callable[[], object]], arguments: tuple[object, ...]
) -> None:
    work = prepare(*arguments)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    result = work()
    after = _status("VmHWM")
    del result
    pipe.send(Peak(used=max(after - before, 0), process=after))


def _status(field: str) -> int:
    return _field(Path("/proc/self/status"), field)


def _meminfo(field: str) -> int:
    return _field(Path("/proc/meminfo"), field)


def _field(path: Path, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{path} has no {field}")
    return int(found[1]) * _KIB


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.processor()
