"""The files that set up an environment name one another rightly."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]


def locked(name: str) -> dict[str, str]:
    """The packages of a lock and their versions."""
    return dict(
        re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^ ;\\]+)", (ROOT / name).read_text(), re.MULTILINE)
    )


def wanted() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [re.split(r"[\[<>=!~ ]", item)[0] for item in project["dependencies"]]


def test_the_conda_environment_takes_python_and_the_lock() -> None:
    text = (ROOT / "environment.yml").read_text()
    assert re.search(r"^name: cb-trade$", text, re.MULTILINE)
    assert re.search(r"^  - python=3\.11$", text, re.MULTILINE)
    (lock,) = re.findall(r"-r (\S+)", text)
    assert {"pandas", "numpy", "pytest", "deltalake"} <= set(locked(lock))


def test_the_image_traces_as_soon_as_it_is_told_where_to() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = [re.split(r"[<>=!~ ]", item)[0] for item in project["optional-dependencies"]["otel"]]
    assert set(extra) <= set(locked("requirements.lock"))


def test_the_locks_hold_every_dependency_by_hash_and_agree() -> None:
    runtime, development = locked("requirements.lock"), locked("requirements-dev.lock")
    assert [name for name in wanted() if name not in runtime] == []
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
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    lock = locked("requirements-peers.lock")
    pinned = dict(item.split("==") for item in groups["peers"] if "==" in item)
    assert {name: lock.get(name) for name in pinned} == pinned
    assert {"cryptofeed", "freqtrade"} <= set(pinned)
    assert {"cython", "orjson", "setuptools", "websockets", "wheel"} <= set(lock)
    assert "--build-constraints requirements-peers.lock" in (ROOT / "Makefile").read_text()


def test_the_lock_of_the_engines_and_their_page_name_the_versions_that_are_wanted() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
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
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"ARG VERSION={version}\n" in (ROOT / "Dockerfile").read_text()
