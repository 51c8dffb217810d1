"""The programs that docs/engines.md shows, run as they stand there in the engines' environment."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Final

from tests.support.processes import clean_environment, completed

PAGE: Final = Path(__file__).parents[3] / "docs/engines.md"
PATIENCE_S: Final = 180.0
# DuckDB looks for its extension on the machine before it downloads it.
_INSTALL: Final = """
import pathlib
import duckdb, duckdb_extension_delta

folder = pathlib.Path(duckdb_extension_delta.__file__).parent
(file,) = folder.rglob("delta.duckdb_extension")
duckdb.sql(f"INSTALL '{file}'")
"""


def program_of(section: str) -> str:
    """The Python program of a section of the page."""
    _, found, rest = PAGE.read_text().partition(f"# {section}\n")
    assert found, f"the page has no section {section!r}"
    own, *_ = re.split(r"^##", rest, flags=re.MULTILINE)
    (block,) = re.findall(r"```python\n(.*?)```", own, re.DOTALL)
    return str(block)


def changed(program: str, old: str, new: str) -> str:
    assert program.count(old) == 1, f"{old!r} is not in the program once"
    return program.replace(old, new)


async def run_engine(program: str, folder: Path) -> tuple[int | None, str, str]:
    """Exit code, output and errors of a program run in ``folder``, which has ``data/``.

    Raises:
        TimeoutError: it had not ended in time; it is killed.
    """
    home = folder / "home"
    # The paths of Ray's sockets have to be short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as ray:
        environment = clean_environment(HOME=str(home), RAY_TMPDIR=ray)
        # Our own modules are not for them, nor is our environment.
        for name in ("PYTHONPATH", "VIRTUAL_ENV"):
            environment.pop(name, None)
        python = str(Path(os.environ["CB_TRADE_ENGINES"]) / "bin/python")
        if not home.exists():
            home.mkdir()
            await _completed(python, _INSTALL, environment, folder)
        return await _completed(python, program, environment, folder)


async def output_of(program: str, folder: Path) -> str:
    code, output, errors = await run_engine(program, folder)
    assert code == 0, (output + errors)[-3_000:]
    return output


async def _completed(
    python: str, program: str, environment: dict[str, str], folder: Path
) -> tuple[int | None, str, str]:
    file = folder / "program.py"
    await asyncio.to_thread(file.write_text, program)
    return await completed(
        python, str(file), environment=environment, folder=folder, within_s=PATIENCE_S
    )


def copied(folder: Path, to: Path) -> Path:
    """A folder whose ``data/`` is a copy, to be damaged."""
    shutil.copytree(folder / "data", to / "data")
    return to
