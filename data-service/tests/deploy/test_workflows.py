"""The workflows run what this repository has, with actions that cannot change under them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
# What GitHub's runners bring: they are not ours to define.
BROUGHT = {"sudo", "python3", "$CONDA/bin/conda", "[[", "git", "echo"}
# What a conda environment brings, or the project installs into it.
IN_CONDA = {"pip", "python", "cb-trade-data"}


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())["jobs"]
    return found


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in jobs(path).values():
        yield from job["steps"]


def missing(command: list[str], targets: set[str]) -> list[str]:
    """What a command names and the repository does not have."""
    first, *rest = command
    if rest[:2] == ["run", "--name"]:
        return [name for name in rest[3:4] if name not in IN_CONDA]
    if first == "make":
        return [word for word in rest if "=" not in word and word not in targets]
    files = [word for word in rest if re.fullmatch(r"[\w./-]+\.(py|sh|yml|lock)", word)]
    absent = [name for name in files if not (ROOT / name).is_file()]
    return absent if first in BROUGHT else [*absent, first]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_command_of_the_workflows_exists() -> None:
    commands = [
        shlex.split(line)
        for path in WORKFLOWS
        for step in steps(path)
        for line in step.get("run", "").splitlines()
    ]
    assert len(commands) >= 8
    assert [found for command in commands if (found := missing(command, make_targets()))] == []


@pytest.mark.parametrize("line", ["make nothing", "python3 deploy/none.py", "trivy image"])
def test_a_command_that_does_not_exist_is_found(line: str) -> None:
    assert missing(shlex.split(line), make_targets())


def test_every_action_is_pinned_by_its_commit_and_says_its_version() -> None:
    for path in WORKFLOWS:
        for line in re.findall(r"uses: (.*)", path.read_text()):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_nothing_is_permitted_but_by_a_job() -> None:
    for path in WORKFLOWS:
        assert yaml.safe_load(path.read_text())["permissions"] == {}
        for name, job in jobs(path).items():
            assert job["permissions"]["contents"] == "read", name
            assert job["timeout-minutes"], name


def test_the_deployment_is_passed_all_that_its_template_takes() -> None:
    (step,) = (s for s in steps(ROOT / ".github/workflows/cd.yml") if "deploy.py" in str(s))
    wanted = set(Template((ROOT / "deploy/aci.yaml").read_text()).get_identifiers())
    worked_out = {name for name in wanted if name.startswith("FALLBACK_")} | {"HOST_NAME"}
    wanted = wanted - worked_out | {"RESOURCE_GROUP", "CHECK_TOKEN"}
    assert wanted - set(step["env"]) == set()
    page = (ROOT / "deploy/README.md").read_text()
    given = set(
        re.findall(r"(?:vars|secrets)\.(\w+)", (ROOT / ".github/workflows/cd.yml").read_text())
    )
    assert {name for name in given if f"`{name}`" not in page} == set()
