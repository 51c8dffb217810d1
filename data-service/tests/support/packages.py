"""Packages in a folder that Python finds on its path, as installing puts them there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Final

EXAMPLE: Final = Path(__file__).parents[1] / "examples" / "example_exchange"
BUILD_TIMEOUT_S: Final = 30.0


def install(source: Path, into: Path) -> None:
    """Build the package of a source folder and unpack it; nothing is downloaded."""
    wheels = into / "wheels"
    wheels.mkdir(parents=True)
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])",
            str(wheels),
        ],
        cwd=source,
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=BUILD_TIMEOUT_S,
    )
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)


def write_package(into: Path, name: str, code: str, **plugins: str) -> None:
    """A package ``name`` of one module, which offers ``plugins``: exchange to class in it."""
    module = name.replace("-", "_")
    (into / f"{module}.py").write_text(code)
    info = into / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    offered = "".join(f"{exchange} = {module}:{class_}\n" for exchange, class_ in plugins.items())
    (info / "entry_points.txt").write_text(f"[cb_trade.exchanges]\n{offered}")
