"""Several processes write the table of targets at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from deltalake import DeltaTable

from domain.clock import MarketClock
from target_management.manager import TargetManager
from tests.support.target_processes import add_at_once

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PROCESSES = 8


async def ids(path: str) -> list[str]:
    """The rows, read by a manager that wrote nothing."""
    manager = TargetManager("local", path, None, MarketClock())
    found = [target.target_id for target in await manager.list_targets()]
    await manager.close()
    return found


async def test_eight_processes_that_add_different_targets_lose_none(tmp_path: Path) -> None:
    path = str(tmp_path / "targets_delta")
    coins = [[f"C{process}X{number}" for number in range(25)] for process in range(PROCESSES)]
    told = await add_at_once(path, coins)
    wanted = sorted(f"crypto.com:{coin}:5m" for mine in coins for coin in mine)
    assert await ids(path) == wanted
    assert [item["added"] for item in told] == [25] * PROCESSES
    print(f"longest wait {max(item['wait'] for item in told):.1f} s")  # noqa: T201
    # Each change tells who made it.
    history = DeltaTable(path).history()
    by = {entry["by"] for entry in history if entry.get("change") == "add_target"}
    assert len(by) == PROCESSES


async def test_eight_processes_that_add_the_same_target_leave_one_row(tmp_path: Path) -> None:
    path = str(tmp_path / "targets_delta")
    told = await add_at_once(path, [["BTC"]] * PROCESSES)
    assert await ids(path) == ["crypto.com:BTC:5m"]
    assert sum(item["added"] for item in told) == 1
