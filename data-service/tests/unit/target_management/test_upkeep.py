"""What keeps the table of targets small: nothing is lost by it, and nobody notices."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from structlog.testing import capture_logs

from target_management.interfaces import TargetError
from target_management.manager import TargetManager
from target_management.upkeep import Upkeep
from tests.support.clock import ManualClock
from tests.support.target_processes import NOW, target

BTC = target("BTC")
KEPT = 1_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "targets_delta"


@pytest.fixture
async def manager(path: Path) -> AsyncIterator[TargetManager]:
    manager = TargetManager("local", str(path), None, ManualClock(NOW))
    await manager.open()
    await manager.add_target(BTC, by="alice")
    yield manager
    await manager.close()


async def change(manager: TargetManager, times: int, *, first: int = 0) -> None:
    for number in range(first, first + times):
        await manager.update_target(BTC.target_id, by=f"bot {number}", since=NOW + number + 1)


def changes(path: Path) -> dict[int, dict[str, Any]]:
    """What the table's history tells, by version."""
    return {entry["version"]: entry for entry in DeltaTable(str(path)).history()}


@pytest.mark.timeout(180)
async def test_the_last_thousand_changes_stay_in_the_history_and_older_ones_in_the_audit(
    manager: TargetManager, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await change(manager, 300)
    # The worst case for the last thousand: the table is opened again and again, and whatever left
    # it may be removed at once.
    monkeypatch.setattr("target_management.upkeep._RETENTION_HOURS", 0)
    for first in range(300, 1_300, 10):
        again = TargetManager("local", str(path), None, ManualClock(NOW))
        await again.open()
        await again.add_target(BTC)
        await change(again, 10, first=first)
        await again.close()
    lines = (path.parent / "targets_audit.jsonl").read_text().splitlines()
    audited = {line["version"]: line for line in map(json.loads, lines)}
    assert len(audited) == len(lines)
    assert list(audited) == sorted(audited)
    kept = changes(path)
    told = [entry["by"] for entry in kept.values() if entry.get("change") == "update_target"]
    assert len(told) >= KEPT
    everything = audited | kept
    # Whatever was moved, no version of the table is without its entry.
    assert sorted(everything) == list(range(max(kept) + 1))
    by = [entry["by"] for _, entry in sorted(everything.items()) if "target_id" in entry]
    assert by == ["alice", *(f"bot {number}" for number in range(1_300))]
    # The log is as short as it should be, and the table as it was.
    assert len(list((path / "_delta_log").glob("*.json"))) <= KEPT + 300
    (held,) = await manager.list_targets()
    assert held.since == NOW + 1_300


async def test_who_opened_the_table_before_upkeep_still_reads_it(
    manager: TargetManager, path: Path
) -> None:
    await change(manager, 5)
    reader = DeltaTable(str(path))
    files = reader.file_uris()
    await change(manager, 120, first=5)
    rows = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    assert [row["since"] for row in rows] == [NOW + 5]


async def test_many_changes_leave_few_files(manager: TargetManager, path: Path) -> None:
    for number in range(60):
        await manager.add_target(target(f"C{number}"))
    assert len(DeltaTable(str(path)).file_uris()) <= 20
    assert len(await manager.list_targets()) == 61


async def test_upkeep_that_fails_is_told_once_and_fails_no_write(
    manager: TargetManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Upkeep, version: int) -> None:
        raise TargetError("the disk is full")

    monkeypatch.setattr(Upkeep, "after", fail)
    with capture_logs() as logs:
        await change(manager, 40)
    assert [entry["log_level"] for entry in logs].count("warning") == 1
    (held,) = await manager.list_targets()
    assert held.since == NOW + 40
