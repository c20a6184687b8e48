"""Runs docker-compose.yml for real: build, up, conformance, a training run while every service is killed, down.

    python deploy/checks/compose.py [--where-possible]

With --where-possible it is no failure that no container engine can be started; it is said.
Uses the machine's docker and registries where there are any; see engine.py for what happens where there are none.
"""

from __future__ import annotations

import json
import os
import secrets
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path

from common import ROOT, expect, run, say
from engine import BASES, Engine, NoEngine

from jest_server.local.process import free_port
from support.certificates import make_authority, sign

TARGETS = {
    "control": "control",
    "scorer": "scorer",
    "selector-cpu": "selector",
    "triton-cpu": "triton-cpu",
    "demo": "demo",
    "conformance": "conformance",
}
KILLED = ("scorer", "selector", "triton", "redis-cache", "redis", "control", "prometheus")
DEMO = ROOT / "trainer" / "examples" / "emoji" / "demo.py"
STEPS = 200
"""Of the quick demo."""
LARGEST_WITHOUT_TORCH = 250 << 20
"""What scorer and control may add to their base."""


class Project:
    """The compose project under a name, ports, passwords and tags of its own."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.name = f"jest-{engine.tag}"
        self.ports = {name: free_port() for name in ("SELECTOR", "CONTROL", "PROMETHEUS", "GRAFANA")}
        settings = {
            "JEST_VERSION": engine.tag,
            "TRITON_IMAGE": f"jest-server/triton-cpu:{engine.tag}",
            "COMPOSE_PROFILES": "cpu",
            **{f"{name}_PORT": str(port) for name, port in self.ports.items()},
            **{f"{name}_PASSWORD": secrets.token_hex(16) for name in ("QUEUE", "CACHE", "GRAFANA")},
            **engine.bases,
        }
        self._settings = folder / "env"
        self._settings.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        self.env = {name: value for name, value in engine.env.items() if name not in settings}

    def set(self, **settings: object) -> None:
        """Goes on with further settings; running containers keep theirs."""
        with self._settings.open("a") as file:
            file.writelines(f"{name}={value}\n" for name, value in settings.items())

    def __call__(self, *arguments: str) -> str:
        options = ["--project-name", self.name, "--env-file", str(self._settings), "--progress", "plain"]
        return run(*self.engine.compose, *options, *arguments, env=self.env, cwd=ROOT)

    def build(self) -> None:
        for target, name in TARGETS.items():
            image = f"jest-server/{name}:{self.engine.tag}"
            self.engine.own_images.insert(0, image)
            arguments = [f"--build-arg={name}={value}" for name, value in self.engine.build_arguments.items()]
            where = ["--file", ROOT / "deploy/docker/Dockerfile", "--target", target, "--tag", image]
            self.engine("build", "--quiet", *where, *arguments, ROOT)
            say(f"{target} is built: {self.size(image) / 1e6:.0f} MB")

    def size(self, image: str) -> int:
        return int(self.engine("image", "inspect", "--format", "{{.Size}}", image))

    def container(self, service: str) -> str:
        return self("ps", "--all", "--quiet", service).strip()

    def control(self, path: str) -> dict[str, object]:
        return _get(f"http://127.0.0.1:{self.ports['CONTROL']}{path}")

    @property
    def selector(self) -> str:
        return f"127.0.0.1:{self.ports['SELECTOR']}"


def main() -> None:
    """Runs all of it, and leaves nothing behind."""
    with Engine() as engine, tempfile.TemporaryDirectory(prefix="jest-compose-") as folder:
        project = Project(engine, Path(folder))
        try:
            _check_profiles(project)
            project.build()
            _check_images(project)
            services = _services(project)
            project("up", "--detach", "--no-build", "--wait", "--wait-timeout", "240", *services)
            say("every service is healthy")
            _check_hardening(project)
            _check_conformance(project)
            _train_while_services_die(project, Path(folder), services)
            _check_trainer(project)
            _check_prometheus(project)
            _check_tls_and_tokens(project, Path(folder))
        except BaseException:
            say("failed; the services' last words:")
            print(project("logs", "--tail", "15"), flush=True)
            raise
        finally:
            project("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "20")
        _check_nothing_left(project)
    say("passed")


def _check_profiles(project: Project) -> None:
    """With a GPU, its selector and Triton take the others' place; they cannot be started without one."""
    for profile in ("gpu", "demo-gpu"):
        services = set(project("--profile", profile, "config", "--services").split())
        expect({"selector-gpu", "triton-gpu"} <= services, f"profile {profile} has no selector or Triton: {services}")
        expect(not {"selector", "triton"} & services, f"profile {profile} has two selectors or Tritons: {services}")


def _services(project: Project) -> list[str]:
    services = project("config", "--services").split()
    if project.engine.bases:
        say("NOT RUN: grafana, whose image cannot be had without a registry")
        services.remove("grafana")
    return services


def _check_images(project: Project) -> None:
    base = project.size(project.engine.build_arguments.get("PYTHON_IMAGE", BASES["PYTHON_IMAGE"]))
    for name in ("scorer", "control"):
        image = f"jest-server/{name}:{project.engine.tag}"
        added = project.size(image) - base
        expect(added < LARGEST_WITHOUT_TORCH, f"{name} adds {added} bytes to its base")
        found = project.engine("run", "--rm", "--network=none", image, "python", "-c", _FIND_TORCH).strip()
        expect(found == "None 10001", f"{name} has torch, or runs as another user: {found}")


_FIND_TORCH = "import importlib.util, os; print(importlib.util.find_spec('torch'), os.getuid())"


def _check_hardening(project: Project) -> None:
    for container in project("ps", "--quiet").split():
        (found,) = json.loads(project.engine("inspect", container))
        host = found["HostConfig"]
        expect(host["ReadonlyRootfs"], f"{found['Name']} may write to its root")
        expect(host["CapDrop"] == ["ALL"], f"{found['Name']} has capabilities")
        expect("no-new-privileges:true" in host["SecurityOpt"], f"{found['Name']} may gain privileges")
        expect(host["Memory"] > 0, f"{found['Name']} has no memory limit")
        addresses = {binding["HostIp"] for bindings in (host["PortBindings"] or {}).values() for binding in bindings}
        expect(addresses <= {"127.0.0.1"}, f"{found['Name']} is published on {addresses}")


def _check_conformance(project: Project) -> None:
    say(f"conformance: {_conformance(project)}")
    image, network = f"jest-server/conformance:{project.engine.tag}", f"{project.name}_default"
    options = ["--rm", "--read-only", "--tmpfs=/tmp", "--network", network]
    said = project.engine("run", *options, image, "--server", "selector:50051", "-k", "test_jobs")
    say(f"conformance, its own image inside the network: {said.strip().splitlines()[-1]}")


def _conformance(project: Project, *options: str | Path) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/conformance"]
    return run(*command, "--server", project.selector, *options, cwd=ROOT).strip().splitlines()[-1]


def _train_while_services_die(project: Project, folder: Path, services: list[str]) -> None:
    results = folder / "results"
    command = [sys.executable, DEMO, "--quick", "--server", project.selector, "--results-dir", results]
    log = folder / "demo.log"
    with log.open("wb") as output:
        training = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=os.environ | _ONE_THREAD)
    try:
        for service in KILLED:
            if service in services:
                _wait_for_steps(project, training, log, more=2)
                project.engine("kill", "--signal", "KILL", project.container(service))
                project("up", "--detach", "--no-build", "--no-deps", "--wait", "--wait-timeout", "90", service)
                say(f"{service} was killed and is healthy again; {_counters(project)}")
        expect(training.wait(timeout=240) == 0, f"training failed:\n{log.read_text()[-4000:]}")
    finally:
        training.kill()
        training.wait()
    counters = _counters(project)
    accounted = counters["selected"] + counters["dead_lettered"] + counters["in_flight"]
    expect(counters["submitted"] == accounted, f"something is lost: {counters}")
    # A killed Redis may forget its last second (docs/architecture.md): what it had decided is in flight again.
    expect(counters["selected"] + counters["in_flight"] >= STEPS, f"too few decisions: {counters}")
    expect(counters["dead_lettered"] == 0, f"dead letters: {counters}")
    say(f"training ended well: {counters}; {json.loads((results / 'results.json').read_text())['verdict']}")


_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def _counters(project: Project) -> dict[str, int]:
    """The demo's job as control tells it; nothing while that is not to be had."""
    try:
        jobs = project.control("/v1/jobs?limit=100")["jobs"]
    except OSError:
        return {}
    assert isinstance(jobs, list)
    return next((job["counters"] for job in jobs if job["spec"]["name"].startswith("emoji-demo")), {})


def _wait_for_steps(project: Project, training: subprocess.Popen[bytes], log: Path, *, more: int) -> None:
    """Waits until the job has gone on."""
    before = _counters(project).get("selected", 0)
    deadline = time.monotonic() + 150
    while _counters(project).get("selected", 0) < before + more:
        expect(training.poll() is None, f"training ended before every service was killed:\n{log.read_text()[-4000:]}")
        expect(time.monotonic() < deadline, f"the job stands still at {before} decisions:\n{log.read_text()[-4000:]}")
        time.sleep(0.2)


def _check_trainer(project: Project) -> None:
    """The demo as `docker compose --profile demo up` runs it, but short, and without its figures."""
    options = ["--quick", "--server", "selector:50051", "--cache-dir", "/tmp/emoji", "--results-dir", "/results"]  # noqa: S108 - the container's own
    project("--profile", "demo", "run", "--rm", "--no-deps", "--no-TTY", "trainer", *options)
    say("the demo trained in its own container")


def _check_prometheus(project: Project) -> None:
    wanted = {"selector", "scorer", "control", "triton"}
    deadline, up = time.monotonic() + 60, set[str]()
    while up != wanted:
        expect(time.monotonic() < deadline, f"Prometheus reaches only {up}")
        time.sleep(0.5)
        answer = _get(f"http://127.0.0.1:{project.ports['PROMETHEUS']}/api/v1/query?query=up==1")
        up = {result["metric"]["job"] for result in answer["data"]["result"]}  # type: ignore[index, call-overload]
    say("Prometheus scrapes selector, scorer, control and triton")


def _check_tls_and_tokens(project: Project, folder: Path) -> None:
    """The stack as docs/compose.md opens it to other machines."""
    secrets_folder = folder / "secrets"
    secrets_folder.mkdir()
    authority = make_authority(folder)
    sign(authority, secrets_folder, "tls")
    token = folder / "token"
    making = [Path(sys.executable).with_name("jest-server"), "token", "vision", "--id", "check", "--days", "1"]
    token.write_text(run(*making, "--file", secrets_folder / "tokens.json"))
    for file in secrets_folder.iterdir():
        file.chmod(0o644)  # user 10001 reads them
    project.set(
        JEST_ALLOW_INSECURE="false",
        SECRETS_DIR=secrets_folder,
        JEST_TOKENS_FILE="/run/jest/tokens.json",
        JEST_TLS_CERTIFICATE="/run/jest/tls.pem",
        JEST_TLS_KEY="/run/jest/tls.key",
    )
    project("up", "--detach", "--no-build", "--no-deps", "--wait", "selector", "scorer", "control")
    said = _conformance(project, "--ca", authority.certificate, "--token-file", token)
    say(f"conformance, with TLS and a token: {said}")
    trusting = ssl.create_default_context(cafile=authority.certificate)
    try:
        urllib.request.urlopen(f"https://127.0.0.1:{project.ports['CONTROL']}/v1/jobs", timeout=5, context=trusting)
    except urllib.error.HTTPError as error:
        expect(error.code == HTTPStatus.UNAUTHORIZED, f"control answers {error.code} to a call without a token")
    else:
        expect(right=False, otherwise="control answers a call without a token")


def _check_nothing_left(project: Project) -> None:
    label = f"label=com.docker.compose.project={project.name}"
    for kind in (("ps", "--all"), ("volume", "ls"), ("network", "ls")):
        left = project.engine(*kind, "--quiet", "--filter", label).split()
        expect(not left, f"docker {kind[0]}: {left} is left")


def _get(url: str) -> dict[str, object]:
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own loopback URL
        return dict(json.load(answer))


if __name__ == "__main__":
    try:
        main()
    except NoEngine as error:
        say(f"NOT RUN: {error}")
        sys.exit(0 if "--where-possible" in sys.argv else 1)
