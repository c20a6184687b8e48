"""What must be true of the objects together, which no schema of single ones can say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

Object = dict[str, Any]
COMPONENT = "app.kubernetes.io/component"
_MARGIN_S = 5


def problems(objects: list[Object]) -> Iterator[str]:
    """Yields a sentence for everything that is wrong."""
    for index, item in enumerate(objects):
        twins = [other for other in objects[:index] if _name(other) == _name(item)]
        if twins:
            yield f"{_name(item)}: there are two of them"
    pods = list(pods_of(objects))
    for item in objects:
        if item["kind"] == "Service":
            yield from _service(item, pods)
    for owner, pod in pods:
        yield from _pod(owner, pod, objects)
    if any(item["kind"] == "NetworkPolicy" for item in objects):
        yield from _fences(objects, pods)
    yield from _scrapes(objects)


def pods_of(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Yields each pod (metadata and spec) with the name of what makes it."""
    for item in objects:
        if item["kind"] == "Pod":
            yield _name(item), item
        elif "template" in item.get("spec", {}):
            yield _name(item), item["spec"]["template"]


def _name(item: Object) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


def _matches(selector: Object, labels: dict[str, str]) -> bool:
    equal = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    among = all(labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", []))
    return equal and among


def _service(service: Object, pods: list[tuple[str, Object]]) -> Iterator[str]:
    selector = dict(service["spec"]["selector"])
    ordinal = selector.pop("statefulset.kubernetes.io/pod-name", None)
    backing = [
        (owner, pod)
        for owner, pod in pods
        if _matches({"matchLabels": selector}, pod["metadata"]["labels"])
        and (ordinal is None or ordinal.rpartition("-")[0] == owner.partition("/")[2])
    ]
    if len(backing) != 1:
        yield f"{_name(service)}: leads to {len(backing)} kinds of pods, expected one"
        return
    names = {port["name"] for container in backing[0][1]["spec"]["containers"] for port in container["ports"]}
    for port in service["spec"]["ports"]:
        if port.get("protocol") != "TCP":
            yield f"{_name(service)}: port {port['name']} has no protocol"
        if port["targetPort"] not in names:
            yield f"{_name(service)}: port {port['targetPort']} is none of the pod's ({', '.join(sorted(names))})"


def _pod(owner: str, pod: Object, objects: list[Object]) -> Iterator[str]:
    spec = pod["spec"]
    if spec.get("automountServiceAccountToken") is not False:
        yield f"{owner}: mounts the service account's token"
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for item in objects:
        if _name(item) == owner:
            volumes |= {claim["metadata"]["name"] for claim in item["spec"].get("volumeClaimTemplates", [])}
    for container in spec["containers"]:
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        if mounted != volumes:
            yield f"{owner}: volumes {sorted(volumes)}, of which {sorted(mounted)} are mounted"
        yield from _settings(owner, spec, container)


def _settings(owner: str, spec: Object, container: Object) -> Iterator[str]:
    names = [variable["name"] for variable in container.get("env", [])]
    yield from (f"{owner}: {name} is set twice" for name in sorted({n for n in names if names.count(n) > 1}))
    values = {variable["name"]: variable.get("value", "") for variable in container.get("env", [])}
    for variable, value in values.items():
        for piece in value.split("$(")[1:]:
            needed = piece.partition(")")[0]
            if needed not in names[: names.index(variable)]:
                yield f"{owner}: {variable} uses {needed}, which is not set before it"
    if "JEST_GRACE_S" in values:
        stop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        needs = stop + float(values["JEST_DRAIN_DELAY_S"]) + float(values["JEST_GRACE_S"])
        if spec["terminationGracePeriodSeconds"] < needs + _MARGIN_S:
            yield f"{owner}: its drain takes {needs:g} s, it is killed after {spec['terminationGracePeriodSeconds']}"
    ports = {port["containerPort"] for port in container.get("ports", [])}
    for setting, value in values.items():
        port = value.rpartition(":")[2]
        if setting.endswith("LISTEN") and not value.startswith("127.") and int(port) not in ports:
            yield f"{owner}: {setting} is {value}, but the container has no port {port}"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container.get(probe, {}).get("grpc", {}).get("port")
        if asked is not None and f"0.0.0.0:{asked}" != values.get("JEST_HEALTH_LISTEN"):
            yield f"{owner}: {probe} asks port {asked}, where nobody answers"


def _fences(objects: list[Object], pods: list[tuple[str, Object]]) -> Iterator[str]:
    """Who can call whom, as the policies say."""
    policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
    for owner, pod in pods:
        labels = pod["metadata"]["labels"]
        if not any(_matches(policy["spec"]["podSelector"], labels) for policy in policies):
            yield f"{owner}: no NetworkPolicy fences it off"
    for policy in policies:
        yield from (
            f"{_name(policy)}: an empty list of peers lets in everybody"
            for rule in (policy["spec"].get("ingress") or [])
            if not rule.get("from")
        )
        if not any(_matches(policy["spec"]["podSelector"], pod["metadata"]["labels"]) for _, pod in pods):
            yield f"{_name(policy)}: fences no pod off"
    trainer = {"jest-server/trainer": "true"}
    lets_in_trainers = any(
        peer.get("podSelector", {}).get("matchLabels") == trainer
        for policy in policies
        for rule in (policy["spec"].get("ingress") or [])
        for peer in rule["from"]
    )
    for owner, pod in pods:
        component = pod["metadata"]["labels"][COMPONENT]
        allowed = _admits(policies, pod, trainer)
        if allowed != ({"grpc"} if component == "selector" and lets_in_trainers else set()):
            yield f"{owner}: a trainer may call its ports {sorted(allowed)}"
        if component == "triton":
            callers = {
                other["metadata"]["labels"][COMPONENT]
                for _, other in pods
                if "grpc" in _admits(policies, pod, other["metadata"]["labels"])
            }
            expected = {other["metadata"]["labels"][COMPONENT] for _, other in pods} & {"scorer", "embed"}
            if callers != expected:
                yield f"{owner}: {sorted(callers)} may call Triton, expected {sorted(expected)}"


def _admits(policies: list[Object], pod: Object, caller: dict[str, str]) -> set[str]:
    ports = set()
    for policy in policies:
        if not _matches(policy["spec"]["podSelector"], pod["metadata"]["labels"]):
            continue
        for rule in policy["spec"].get("ingress") or []:
            if any("podSelector" in peer and _matches(peer["podSelector"], caller) for peer in rule.get("from", [])):
                ports |= {port["port"] for port in rule["ports"]}
    return ports


def _scrapes(objects: list[Object]) -> Iterator[str]:
    """Each process with metrics is found by exactly one Service, whose component is its job."""
    monitors = [item for item in objects if item["kind"] == "ServiceMonitor"]
    for monitor in monitors:
        found = [
            item["metadata"]["labels"][COMPONENT]
            for item in objects
            if item["kind"] == "Service"
            and _matches(monitor["spec"]["selector"], item["metadata"]["labels"])
            and any(port["name"] == "metrics" for port in item["spec"]["ports"])
        ]
        expected = {
            pod["metadata"]["labels"][COMPONENT]
            for _, pod in pods_of(objects)
            if any(port["name"] == "metrics" for port in pod["spec"]["containers"][0].get("ports", []))
        }
        if sorted(found) != sorted(expected):
            yield f"{_name(monitor)}: reads metrics of {sorted(found)}, expected each of {sorted(expected)} once"
