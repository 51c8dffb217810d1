"""What a change of the table of targets costs after a thousand of them, against after ten.

A local table and one manager, as the service has it; checkpoints, merging of files, clearing of the
log and vacuum run in between where they are due. Each figure is a median of ``REPEATS``. The
yardstick is the same operation after ten commits, in the same run.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from domain.clock import MarketClock
from target_management.manager import TargetManager

# Targets are made as tests make them.
sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.targets import make_target

REPEATS = 15
FEW, MANY = 10, 1_000
BAR = 2.0
NOW = 1_795_348_800_000


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


async def measured(manager: TargetManager, name: str) -> dict[str, float]:
    """Medians (s); what is measured leaves the table with as many rows as it had."""
    seconds: dict[str, list[float]] = {"add": [], "update": [], "list": [], "list, unchanged": []}
    for number in range(REPEATS):
        row = make_target(f"{name}{number}", since=NOW, now=NOW)
        seconds["add"].append(await timed(partial(manager.add_target, row)))
        seconds["list"].append(await timed(manager.list_targets))
        seconds["list, unchanged"].append(await timed(manager.list_targets))
        seconds["update"].append(
            await timed(partial(manager.update_target, row.target_id, enabled=False))
        )
        await manager.delete_target(row.target_id)
    return {operation: statistics.median(values) for operation, values in seconds.items()}


async def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        manager = TargetManager("local", str(Path(folder) / "targets"), None, MarketClock())
        await manager.open()
        for number in range(FEW):
            await manager.add_target(make_target(f"F{number}", since=NOW, now=NOW))
        few = await measured(manager, "A")
        # The same few rows, changed a thousand times.
        for number in range(MANY):
            await manager.update_target(f"crypto.com:F{number % FEW}:5m", since=NOW - number - 1)
        many = await measured(manager, "B")
        await manager.close()
    missed = False
    for operation, before in few.items():
        ratio = many[operation] / before
        # What costs less than a millisecond is noise of the clock, not of the table.
        held = ratio <= BAR or many[operation] < 0.001
        missed |= not held
        print(
            f"{operation}: {before * 1000:.1f} ms after {FEW} commits, "
            f"{many[operation] * 1000:.1f} ms after {MANY} more; ratio {ratio:.2f}; "
            f"bar {BAR}: {'held' if held else 'MISSED'}"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
