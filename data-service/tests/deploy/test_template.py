"""The template of the container group is one that Azure's own library understands as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any

import yaml
from azure.mgmt.containerinstance.models import ContainerGroup

TEMPLATE = Path(__file__).parents[3] / "deploy/aci.yaml"


def filled() -> dict[str, Any]:
    template = Template(TEMPLATE.read_text())
    values = {name: json.dumps(name.lower()) for name in template.get_identifiers()}
    group: dict[str, Any] = yaml.safe_load(template.substitute(values))
    return group


def as_azure_reads_it(group: dict[str, Any]) -> Any:
    """The library leaves out what it does not know, and raises where a value is of another type."""
    return ContainerGroup.deserialize(group).serialize(keep_readonly=True)


def test_azure_knows_all_that_the_template_says() -> None:
    group = filled()
    # Of the file, not of the group.
    assert group.pop("apiVersion") == "2023-05-01"
    assert as_azure_reads_it(group) == group


def test_what_azure_does_not_know_is_found() -> None:
    group = filled()
    service = group["properties"]["containers"][0]["properties"]
    service["readinessprobe"] = service.pop("readinessProbe")
    assert "readinessprobe" not in str(as_azure_reads_it(group))


def test_the_service_is_reached_through_tls_alone_and_holds_no_key() -> None:
    group = filled()["properties"]
    assert {port["port"] for port in group["ipAddress"]["ports"]} == {80, 443}
    service, tls = (container["properties"] for container in group["containers"])
    assert "ports" not in service
    assert {port["port"] for port in tls["ports"]} == {80, 443}
    for probe in ("livenessProbe", "readinessProbe"):
        assert service[probe]["httpGet"]["port"] == 8000
    plain = {item["name"] for item in service["environmentVariables"] if "value" in item}
    assert "AUTH_SECRET" not in plain
    assert not [name for name in plain if "KEY" in name or "CONNECTION_STRING" in name]
