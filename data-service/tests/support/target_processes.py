"""A process that adds targets, and says how long it had to wait; and many of them at once."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domain.clock import MarketClock
from target_management.interfaces import Target
from target_management.manager import TargetManager
from tests.support.processes import clean_environment
from tests.support.targets import make_target

ROOT = Path(__file__).parents[2]
NOW = 1_795_348_800_000


def target(coin: str) -> Target:
    """A target of that coin."""
    return make_target(coin, since=NOW, now=NOW)


async def add_at_once(
    path: str, coins: Sequence[Sequence[str]], options: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Let a process for each list of coins add them, all at the same time; what each came to:
    how many it was told to have ``added``, and its longest ``wait`` (s)."""
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.support.target_processes",
            path,
            *mine,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=clean_environment(
                PYTHONPATH=f"{ROOT / 'src'}{os.pathsep}{ROOT}",
                OPTIONS=json.dumps(options),
            ),
        )
        for mine in coins
    ]
    for process in processes:
        assert process.stdout is not None
        await process.stdout.readline()
    # All are up and have opened the table: now.
    outputs = await asyncio.gather(*(process.communicate(b"\n") for process in processes))
    assert [process.returncode for process in processes] == [0] * len(processes)
    return [json.loads(output) for output, _ in outputs]


async def _main(path: str, coins: Sequence[str]) -> None:
    options = json.loads(os.environ["OPTIONS"])
    storage_type = "local" if options is None else "azure"
    manager = TargetManager(storage_type, path, options, MarketClock(), timeout_s=60)
    await manager.open()
    print("ready", flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.readline)
    added, longest = 0, 0.0
    for coin in coins:
        began = time.monotonic()
        added += await manager.add_target(target(coin), by=f"process {os.getpid()}")
        longest = max(longest, time.monotonic() - began)
    print(json.dumps({"added": added, "wait": longest}))  # noqa: T201
    await manager.close()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2:]))
