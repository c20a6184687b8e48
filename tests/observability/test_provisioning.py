"""What compose mounts into Prometheus and Grafana names services, ports and folders that are there."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OBSERVABILITY = ROOT / "deploy" / "observability"
METRICS_PORTS = {"selector": 9101, "scorer": 9102, "control": 9103, "triton": 8002}
"""Those that deploy/docker/Dockerfile exposes."""


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def mounts(service):
    """Folders and files of the repository that a service sees, by their place in its container."""
    volumes = (volume.split(":") for volume in service["volumes"])
    return {place: ROOT / source for source, place, *_ in volumes if source.startswith(".")}


def provisioned(kind):
    (file,) = (OBSERVABILITY / "grafana" / "provisioning" / kind).iterdir()
    return yaml.safe_load(file.read_text())


def test_grafana_asks_the_prometheus_of_the_stack(services):
    (source,) = provisioned("datasources")["datasources"]
    url = urlsplit(source["url"])
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    assert url.hostname in services
    assert any(port.endswith(f":{url.port}") for port in services[url.hostname]["ports"])


def test_grafana_finds_the_dashboards_where_they_are_mounted(services, dashboards):
    (provider,) = provisioned("dashboards")["providers"]
    folder = mounts(services["grafana"])[provider["options"]["path"]]
    assert {file.name for file in folder.glob("*.json")} == set(dashboards)
    assert mounts(services["grafana"])["/etc/grafana/provisioning"] == OBSERVABILITY / "grafana" / "provisioning"


def test_prometheus_scrapes_services_of_the_stack_where_they_answer(services):
    config = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text())
    targets = {
        target
        for job in config["scrape_configs"]
        for found in job.get("static_configs", []) + job.get("dns_sd_configs", [])
        for target in found.get("targets", [f"{name}:{found.get('port')}" for name in found.get("names", [])])
    }
    assert targets == {f"{name}:{port}" for name, port in METRICS_PORTS.items()}
    assert METRICS_PORTS.keys() <= services.keys()


def test_prometheus_reads_every_file_of_rules(services):
    config = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text())
    mounted = mounts(services["prometheus"])
    read = {
        file
        for pattern in config["rule_files"]
        for place, folder in mounted.items()
        if (Path("/etc/prometheus") / pattern).is_relative_to(place) and folder.is_dir()
        for file in folder.glob(str((Path("/etc/prometheus") / pattern).relative_to(place)))
    }
    assert read == set((OBSERVABILITY / "rules").iterdir())
