"""How soon a service serves and how much memory it takes, against importing its libraries alone.

Three exchanges on the sandbox, nothing collected; bytecode is on disk and files are in the page
cache. Each figure is a median of interleaved repeats, each in a process of its own, from its start
on; memory is what is resident (RSS) at that moment.

- serve: ``cb-trade-data serve`` until it says where it serves, with ``/health/ready`` at 200.
- yardstick: a process that imports what ``serve`` imports of others, and nothing else; of ccxt the
  classes of the three exchanges, loaded as the service loads them.
- for comparison: the same with ``import ccxt.pro`` as it is.

Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from domain.clock import MarketClock

# Processes are started as tests start them.
sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.processes import Stack, clean_environment, line_with, stack_to_start, stop

REPEATS = 9
TIME_BAR = 2.5
MEMORY_BAR_MB = 80
EXCHANGES = {"crypto.com": "cryptocom", "binance": "binance", "coinbase": "coinbase"}

LIBRARIES = """
import aiohttp, arro3.core, bcrypt, deltalake, deltalake.fs, fastapi, fastapi_mcp, httpx, jose.jwt
import mcp, msgspec, numpy, orjson, prometheus_client, pyarrow, pyarrow.fs, pyarrow.parquet
import pydantic, pydantic_settings, python_multipart, structlog, uvicorn
import uvicorn.lifespan.on, uvicorn.loops.auto, uvicorn.protocols.http.auto
import uvicorn.protocols.websockets.auto
"""
LAZY = "import exchange_source.plugins\n"
CLASSES = "import ccxt.pro\n" + "".join(f"ccxt.pro.{name}\n" for name in EXCHANGES.values())
# Stays until it is told to go, so that its memory can be looked at.
READY = "import sys\nprint('imported', flush=True)\nsys.stdin.read()\n"


@dataclass
class Figures:
    """Seconds until ready, and MB then, of each repeat."""

    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    def note(self, started: float, pid: int) -> None:
        self.seconds.append(time.perf_counter() - started)
        self.megabytes.append(resident_mb(pid))

    @property
    def median(self) -> tuple[float, float]:
        return statistics.median(self.seconds), statistics.median(self.megabytes)


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    (kilobytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(kilobytes) / 1024


async def imported(code: str, folder: Path, figures: Figures) -> None:
    """Run the imports once."""
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code + READY,
        env=clean_environment(),
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    await line_with(process, "imported")
    figures.note(started, process.pid)
    await stop(process)


async def served(stack: Stack, figures: Figures) -> None:
    """Start the service once."""
    started = time.perf_counter()
    await stack.start_service()
    assert stack.service is not None
    figures.note(started, stack.service.pid)
    status, said = await stack.readiness()
    if status != 200:
        raise SystemExit(f"not ready: {said}")
    if "left_out" in stack.logs():
        raise SystemExit(f"an exchange is missing:\n{stack.logs()}")
    await stack.stop_service()


def show(what: str, figures: Figures) -> tuple[float, float]:
    seconds, megabytes = figures.median
    print(f"{what}: {seconds:.2f} s, {megabytes:.0f} MB", flush=True)
    return seconds, megabytes


def verdict(what: str, figure: float, bar: float) -> bool:
    held = figure <= bar
    print(f"{what}; the bar is {bar:g}: {'held' if held else 'MISSED'}", flush=True)
    return held


async def main() -> int:
    """Measure and print."""
    serve, lazy, plain = Figures(), Figures(), Figures()
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as name:
        folder = Path(name)
        async with stack_to_start(folder, MarketClock(), EXCHANGES=",".join(EXCHANGES)) as stack:
            endpoints = dict.fromkeys(EXCHANGES, stack.sandbox_url)
            stack.settings["EXCHANGE_ENDPOINTS"] = json.dumps(endpoints)
            # What is not on disk yet is written by the first run, which does not count.
            await served(stack, Figures())
            for _ in range(REPEATS):
                await served(stack, serve)
                await imported(LIBRARIES + LAZY + CLASSES, folder, lazy)
                await imported(LIBRARIES + CLASSES, folder, plain)
    seconds, megabytes = show("serve, three exchanges", serve)
    least_s, least_mb = show("its libraries", lazy)
    show("its libraries, ccxt as it is", plain)
    times, more = seconds / least_s, megabytes - least_mb
    bars = (
        verdict(f"ready in {times:.2f} times what its libraries take", times, TIME_BAR),
        verdict(f"{more:.0f} MB above them", more, MEMORY_BAR_MB),
    )
    return 0 if all(bars) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
