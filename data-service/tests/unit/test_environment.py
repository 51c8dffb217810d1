"""The files that set up an environment name one another rightly."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]


def locked(name: str) -> dict[str, str]:
    """The packages of a lock and their versions."""
    return dict(
        re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^ ;\\]+)", (ROOT / name).read_text(), re.MULTILINE)
    )


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return found


def wanted() -> list[Requirement]:
    return [Requirement(item) for item in project()["project"]["dependencies"]]


# name, name=version or name==version: what conda's own parser takes of what is written there.
CONDA_SPEC = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]*)(?:={1,2}(?P<version>\d+(?:\.\d+)*))?")


def test_the_conda_environment_is_what_the_project_wants() -> None:
    """Read as conda reads it; that it can be created is for a machine that reaches conda-forge."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(environment) == {"name", "channels", "dependencies"}
    assert environment["name"] == "cb-trade"
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *specs, pip = environment["dependencies"]
    versions: dict[str, str] = {}
    for spec in specs:
        parsed = CONDA_SPEC.fullmatch(spec)
        assert parsed, spec
        versions[parsed["name"]] = parsed["version"]
    assert set(versions) == {"python", "nodejs", "pip"}
    assert versions["python"] in SpecifierSet(project()["project"]["requires-python"])
    hashes, lock = pip["pip"]
    assert (set(pip), hashes) == ({"pip"}, "--require-hashes")
    assert lock == "-r requirements-dev.lock"


def test_the_lock_holds_what_the_project_wants_and_nothing_unpinned() -> None:
    lock = locked("requirements-dev.lock")
    groups = [Requirement(item) for item in project()["dependency-groups"]["dev"]]
    assert {"pandas", "numpy", "pytest", "deltalake"} <= set(lock)
    assert {
        str(item): lock.get(canonicalize_name(item.name))
        for item in [*wanted(), *groups]
        if lock.get(canonicalize_name(item.name), "") not in item.specifier
    } == {}
    text = (ROOT / "requirements-dev.lock").read_text()
    for package in re.split(r"\n(?=\S)", text):
        first = package.splitlines()[0]
        assert re.match(r"[a-z0-9._-]+==\S+", first), first
        assert "--hash=sha256:" in package, first


def test_the_image_traces_as_soon_as_it_is_told_where_to() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = [re.split(r"[<>=!~ ]", item)[0] for item in project["optional-dependencies"]["otel"]]
    assert set(extra) <= set(locked("requirements.lock"))


def test_the_locks_hold_every_dependency_by_hash_and_agree() -> None:
    runtime, development = locked("requirements.lock"), locked("requirements-dev.lock")
    assert [item for item in wanted() if item.name not in runtime] == []
    assert {
        name: (version, development.get(name))
        for name, version in runtime.items()
        if development.get(name) != version
    } == {}
    for name in ("", "-dev", "-bootstrap", "-peers", "-engines"):
        text = (ROOT / f"requirements{name}.lock").read_text()
        assert "--hash=sha256:" in text
        assert "http" not in re.sub(r"^[a-z0-9._-]+==.*$", "", text, flags=re.MULTILINE)


def test_the_lock_of_the_peers_holds_them_as_they_are_wanted_and_what_builds_them() -> None:
    groups = project()["dependency-groups"]
    lock = locked("requirements-peers.lock")
    pinned = dict(item.split("==") for item in groups["peers"] if "==" in item)
    assert {name: lock.get(name) for name in pinned} == pinned
    assert {"cryptofeed", "freqtrade"} <= set(pinned)
    assert {"cython", "orjson", "setuptools", "websockets", "wheel"} <= set(lock)
    assert "--build-constraints requirements-peers.lock" in (ROOT / "Makefile").read_text()


def test_the_lock_of_the_engines_and_their_page_name_the_versions_that_are_wanted() -> None:
    groups = project()["dependency-groups"]
    lock = locked("requirements-engines.lock")
    items = (re.sub(r"\[.*\]", "", item) for item in groups["engines"] if "==" in item)
    pinned = dict(item.split("==") for item in items)
    assert {name: lock.get(name) for name in pinned} == pinned
    page = (ROOT / "docs/engines.md").read_text().split("| engine | version |")[1].split("\n\n")[0]
    told = {name.lower(): version for name, version in re.findall(r"\| (\w+) \| ([\d.]+) \|", page)}
    assert set(told) == {"polars", "duckdb", "daft", "ray"}
    assert {name: pinned[name] for name in told} == told


def test_the_emulator_of_azure_is_one_version_locked_by_hash_without_addresses() -> None:
    folder = ROOT / "data-service/tests/azurite"
    package = json.loads((folder / "package.json").read_text())
    assert package["dependencies"] == {"azurite": "3.35.0"}
    lock = json.loads((folder / "package-lock.json").read_text())
    root = lock["packages"].pop("")
    assert root["dependencies"] == package["dependencies"]
    assert lock["packages"]["node_modules/azurite"]["version"] == "3.35.0"
    for name, locked_package in lock["packages"].items():
        assert "resolved" not in locked_package, name
        assert locked_package["integrity"].startswith("sha512-"), name


def test_the_image_copies_what_exists() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source


def test_the_image_is_labelled_with_the_version_of_the_project() -> None:
    version = project()["project"]["version"]
    assert f"ARG VERSION={version}\n" in (ROOT / "Dockerfile").read_text()
