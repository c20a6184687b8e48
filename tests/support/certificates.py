"""Certificates for tests, made by openssl: an authority, and what it signs."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")

_NEW_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path


def make_authority(folder: Path, name: str = "authority") -> Pair:
    """Makes an authority that signs others."""
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    _openssl(f"req -x509 {_NEW_KEY} -subj /CN={name} -keyout {pair.key} -out {pair.certificate}")
    return pair


def sign(authority: Pair, folder: Path, name: str) -> Pair:
    """Makes a certificate for localhost that the authority vouches for."""
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    _openssl(
        f"req -x509 {_NEW_KEY} -subj /CN={name} -addext subjectAltName=DNS:localhost,IP:127.0.0.1 "
        f"-CA {authority.certificate} -CAkey {authority.key} "
        f"-addext basicConstraints=critical,CA:FALSE -keyout {pair.key} -out {pair.certificate}"
    )
    return pair


def _openssl(command: str) -> None:
    done = subprocess.run(["openssl", *command.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
