"""What every check of the deployment does: it speaks to a person, runs tools, and ends at the first thing wrong."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".cache" / "tools"
"""Where tools are kept that the machine lacks."""
_STARTED = time.monotonic()


def say(sentence: str) -> None:
    """Tells what happens, with the seconds since the start."""
    print(f"[{time.monotonic() - _STARTED:4.0f} s] {sentence}", flush=True)


def expect(right: object, otherwise: str) -> None:
    """Ends the check with a sentence if something is not as it has to be."""
    if not right:
        raise SystemExit(otherwise)


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Runs a command to its end and returns what it said; ends the check with what it said if it fails."""
    words = [str(part) for part in command]
    done = subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr)[-6000:]
    expect(done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}:\n{said}")
    return done.stdout


def works(*command: str | Path) -> bool:
    """Tells whether a command ends well, within a minute."""
    try:
        return subprocess.run([str(p) for p in command], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def unpack_debian(package: str, folder: Path) -> None:
    """Unpacks a package of Debian's without installing it: installed, it may start a server of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run("apt-get", "download", "-qq", package, cwd=folder)
    except SystemExit:
        run("apt-get", "update", "-qq")
        run("apt-get", "download", "-qq", package, cwd=folder)
    (archive,) = folder.glob(f"{package}_*.deb")
    run("dpkg-deb", "--extract", archive, folder)
    archive.unlink()


def install_debian(*packages: str) -> None:
    """Installs packages of Debian's, without starting what they would start."""
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    run("apt-get", "update", "-qq", env=quiet)
    run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages, env=quiet)
