"""The single files of the import root keep to the layers too, and every package is known to them.

import-linter checks the packages; it takes no single file for a root.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
PACKAGES = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
FILES = {path.stem for path in SOURCE.glob("*.py")}
ANYTHING = PACKAGES | FILES
# What starts the program.
STARTING = {"main", "cli", "demo", "export", "seal", "serving", "signals", "verify"}
# What each file may import of ours.
ALLOWED = {
    "errors": set[str](),
    "models": {"domain", "errors"},
    "config": {"domain", "errors"},
    "main": ANYTHING - STARTING - {"sandbox"},
    "export": {"config", "domain", "errors", "historical", "observability", "storage"},
    "seal": {"config", "domain", "errors", "historical", "observability", "storage"},
    "verify": ANYTHING
    - {
        "api",
        "auth",
        "cli",
        "collection",
        "demo",
        "export",
        "historical",
        "main",
        "sandbox",
        "seal",
        "serving",
        "signals",
    },
    "signals": set(),
    "serving": {"api", "config", "errors", "observability", "signals"},
    "cli": {
        "auth",
        "config",
        "domain",
        "errors",
        "export",
        "main",
        "models",
        "observability",
        "sandbox",
        "seal",
        "serving",
        "signals",
        "verify",
    },
    "demo": {"auth", "config", "errors"},
}


def imported(file: Path) -> set[str]:
    """The top-level names of ours that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module.split(".")[0])
    return names & ANYTHING


def test_every_single_file_has_a_rule() -> None:
    assert set(ALLOWED) == FILES


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_a_single_file_imports_downward_only(name: str) -> None:
    assert imported(SOURCE / f"{name}.py") <= ALLOWED[name]


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_no_package_imports_what_starts_the_program(package: str) -> None:
    for file in (SOURCE / package).rglob("*.py"):
        assert not imported(file) & STARTING, file
