"""`make helm-test`: the chart rendered by real helm of both majors, and everything it renders validated.

No cluster is asked. What an API server would refuse is looked for by Kubernetes' own schemas, by those of the custom
kinds, by policy checks, and by rules of ours about the objects together.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import custom
import jsonschema
import kubernetes_validate
import yaml
from common import ROOT, run
from documents import documents, leaves
from objects import COMPONENT, pods_of, problems
from tools import CHART, helms, version
from wrong_values import WRONG

if TYPE_CHECKING:
    from collections.abc import Iterator

    from objects import Object

KUBERNETES = ("1.30", "1.34", "1.37")
"""The oldest that Chart.yaml admits, one between, and the newest whose schema there is."""
HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
_NAMESPACE = "jest"
_NOT_OF_TESTS = {
    "checkov.io/skip1": "CKV_K8S_8=a test ends by itself, and has a deadline",
    "checkov.io/skip2": "CKV_K8S_9=nobody calls a test",
}


def main() -> None:
    """Runs all checks and tells what each of them saw; ends with 1 at the first that fails."""
    scenarios = sorted((CHART / "ci").glob("*-values.yaml"))
    _files(scenarios)
    seen: set[str] = set()
    rendered: dict[str, list[Object]] = {}
    for major, helm in helms().items():
        with tempfile.TemporaryDirectory() as folder:
            package = _package(helm, Path(folder))
            for scenario in scenarios:
                run(helm, "lint", "--strict", CHART, "--values", scenario)
                for kubernetes in KUBERNETES:
                    objects = _valid(helm, package, scenario, kubernetes)
                    seen |= {item["kind"] for item in objects}
                    rendered[scenario.name] = objects
                _tells_what_is_next(_notes(helm, scenario, Path(folder)), scenario, objects)
        print(
            f"helm {version(helm)}: {len(scenarios)} scenarios linted, rendered and valid for {', '.join(KUBERNETES)}"
        )
        _refusals(helm)
        if major == max(helms()):
            _policies(helm, scenarios)
    _shared_files(rendered)
    _hand_over(rendered)
    unseen = set(custom.SCHEMAS) - seen
    if unseen and not ("PrometheusRule" in unseen and not list((CHART / "rules").glob("*.yaml"))):
        _fail(f"no scenario makes a {', '.join(sorted(unseen))}")
    print(f"kinds: {', '.join(sorted(seen))}")


def _files(scenarios: list[Path]) -> None:
    """Files as written by hand, and those that are made from others."""
    for name, content in documents().items():
        if (CHART / name).read_text() != content:
            _fail(f"{name} is not what it is made from: run make documents")
    config = "{extends: default, rules: {line-length: {max: 140}, document-start: disable}}"
    run(BIN / "yamllint", "--strict", "-d", config, CHART / "Chart.yaml", CHART / "values.yaml", CHART / "ci")
    schema = CHART / "values.schema.json"
    run(BIN / "check-jsonschema", "--check-metaschema", schema)
    run(BIN / "check-jsonschema", "--schemafile", schema, CHART / "values.yaml", *scenarios)
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    declared = set(_declared(json.loads(schema.read_text()), ""))
    lacking = {path for path in declared if path != "global" and not _has(defaults, path.split("."))}
    if lacking:
        _fail(f"values.schema.json tells of values that values.yaml lacks: {', '.join(sorted(lacking))}")
    count = len(list(leaves((CHART / "values.yaml").read_text())))
    print(f"{count} values, each with a sentence and a schema; {len(scenarios)} scenarios; made files as made")


def _declared(schema: dict[str, Any], above: str) -> Iterator[str]:
    """Yields the paths of all properties that are written out in the schema itself."""
    for name, inner in schema.get("properties", {}).items():
        yield above + name
        yield from _declared(inner, f"{above}{name}.")


def _has(values: Any, path: list[str]) -> bool:
    for name in path:
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def _package(helm: str, folder: Path) -> Path:
    """Packs the chart, looks for the files that come through links, and returns the archive."""
    run(helm, "package", CHART, "--destination", folder)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as opened:
        names = {name.removeprefix("jest-server/") for name in opened.getnames()}
    for linked, pattern in (("rules", "*.yaml"), ("dashboards", "*.json")):
        wanted = {f"{linked}/{path.name}" for path in (ROOT / "deploy/observability" / linked).glob(pattern)}
        if not wanted <= names:
            _fail(f"the package lacks {', '.join(sorted(wanted - names))}")
    if "README.head.md" in names:
        _fail("the package holds what its README is made from")
    return archive


def _render(helm: str, chart: Path, scenario: Path, kubernetes: str, *more: str) -> list[Object]:
    command = [helm, "template", "jest", chart, "--namespace", _NAMESPACE, "--values", scenario]
    return [item for item in yaml.safe_load_all(run(*command, "--kube-version", f"{kubernetes}.0", *more)) if item]


def _valid(helm: str, package: Path, scenario: Path, kubernetes: str) -> list[Object]:
    objects = _render(helm, package, scenario, kubernetes)
    where = f"{scenario.name}, helm {version(helm)}, Kubernetes {kubernetes}"
    for item in objects:
        name = f"{item['kind']}/{item['metadata']['name']}"
        try:
            if item["kind"] in custom.SCHEMAS:
                custom.validate(item)
            else:
                kubernetes_validate.validate(item, kubernetes, strict=True)
        except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
            _fail(f"{where}: {name}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError:
            _fail(f"{where}: {name}: there is no schema of {item['apiVersion']} {item['kind']}")
    for problem in problems(objects):
        _fail(f"{where}: {problem}")
    return objects


def _refusals(helm: str) -> None:
    """Values that cannot be are refused, by a message that names them."""
    for what, (values, expected) in WRONG.items():
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(values, file)
            command = [helm, "template", "jest", CHART, "--values", file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.returncode:
            _fail(f"helm {version(helm)} takes {what}: {values}")
        said = "\n".join(line for line in done.stderr.splitlines() if "symbolic link" not in line)
        lacking = [word for word in expected if word.lower() not in said.lower()]
        if lacking:
            _fail(f"helm {version(helm)} refuses {what}, but does not say {lacking}:\n{said}")
    print(f"helm {version(helm)}: {len(WRONG)} wrong values refused by name")


def _notes(helm: str, scenario: Path, folder: Path) -> str:
    """Renders NOTES.txt, which helm itself does only when it installs: as an object of a copy of the chart."""
    copy = folder / "notes" / CHART.name
    if not copy.exists():
        shutil.copytree(CHART, copy)
        text = (copy / "templates/NOTES.txt").read_text()
        body = 'apiVersion: v1\nkind: ConfigMap\nmetadata: {name: n}\ndata: {notes: {{ include "notes" . | toJson }}}\n'
        (copy / "templates/notes.yaml").write_text(f'{{{{- define "notes" -}}}}\n{text}{{{{- end -}}}}\n{body}')
    objects = _render(helm, copy, scenario, KUBERNETES[-1], "--show-only", "templates/notes.yaml")
    return str(objects[0]["data"]["notes"])


def _tells_what_is_next(notes: str, scenario: Path, objects: list[Object]) -> None:
    """The notes name a Service that there is, and `helm test` where there is one."""
    names = {item["metadata"]["name"] for item in objects if item["kind"] == "Service"}
    hooks = any("helm.sh/hook" in item["metadata"].get("annotations", {}) for item in objects)
    told = re.findall(r"Trainers connect to ([a-z0-9-]+)\.jest:50051", notes)
    if any(name not in names for name in told) or bool(told) != any(name.endswith("-selector") for name in names):
        _fail(f"{scenario.name}: the notes tell {told} as the address; Services: {sorted(names)}")
    if hooks != ("helm -n jest test jest" in notes) or "kubectl -n jest wait" not in notes:
        _fail(f"{scenario.name}: the notes do not tell the next command:\n{notes}")


def _shared_files(rendered: dict[str, list[Object]]) -> None:
    """Rules and dashboards arrive as they are in deploy/observability, whatever templates did to them."""
    objects = rendered["production-values.yaml"]
    groups = [item["spec"]["groups"] for item in objects if item["kind"] == "PrometheusRule"]
    files = [item["data"] for item in objects if item["kind"] == "ConfigMap"]
    for path in sorted((CHART / "rules").glob("*.yaml")):
        if yaml.safe_load(path.read_text())["groups"] not in groups:
            _fail(f"{path.name} does not arrive as it is")
    for path in sorted((CHART / "dashboards").glob("*.json")):
        arrived = [json.loads(data[path.name]) for data in files if path.name in data]
        if arrived != [json.loads(path.read_text())]:
            _fail(f"{path.name} does not arrive as it is")
    print(f"{len(groups)} files of rules and {len(files)} dashboards arrive as they are")


def _hand_over(rendered: dict[str, list[Object]]) -> None:
    """Leaves what our own code has to take where accepted.py finds it."""
    secrets = {
        item["metadata"]["name"]: item["stringData"]
        for item in rendered["trial-values.yaml"]
        if item["kind"] == "Secret"
    }
    maps = {item["metadata"]["name"]: item for item in rendered["trial-values.yaml"] if item["kind"] == "ConfigMap"}
    processes = {
        scenario: [
            (pod["metadata"]["labels"][COMPONENT], _environment(pod["spec"]["containers"][0]))
            for _, pod in pods_of(objects)
            if pod["metadata"]["labels"][COMPONENT] in ("selector", "scorer", "control", "embed")
        ]
        for scenario, objects in rendered.items()
    }
    redis = {
        store: {
            "url": secrets["jest-jest-server-redis"][f"{store}-url"],
            "acl": secrets["jest-jest-server-redis-users"][f"{store}.acl"],
            "conf": maps[f"jest-jest-server-redis-{store}"]["data"]["redis.conf"],
        }
        for store in ("queue", "cache")
    }
    (BIN.parent / "rendered.json").write_text(json.dumps({"processes": processes, "redis": redis}))


def _environment(container: Object) -> dict[str, str]:
    """What the process sees, but for Secrets: a stand-in takes their place."""
    environment = {}
    for variable in container["env"]:
        stand_in = "redis://jest:x@redis:6379/0" if variable["name"].endswith("_URL") else "x"
        environment[variable["name"]] = variable.get("value", stand_in)
    return environment


def _policies(helm: str, scenarios: list[Path]) -> None:
    """Policies that the field has agreed upon, but for the exceptions in checkov.yaml."""
    with tempfile.TemporaryDirectory() as folder:
        for scenario in scenarios:
            objects = _render(helm, CHART, scenario, KUBERNETES[-1])
            for item in objects:
                if item["metadata"].get("annotations", {}).get("helm.sh/hook") == "test":
                    item["metadata"]["annotations"] |= _NOT_OF_TESTS
            (Path(folder) / scenario.name).write_text(yaml.safe_dump_all(objects))
        run(
            BIN / "checkov", "--config-file", HERE / "checkov.yaml", "--framework", "kubernetes", "--directory", folder,
            "--quiet", "--compact", "--skip-download",
        )  # fmt: skip
    print(f"checkov: every policy holds in {len(scenarios)} scenarios, but for the exceptions of checkov.yaml")


def _fail(message: str) -> None:
    sys.exit(f"helm-test: {message}")


if __name__ == "__main__":
    main()
