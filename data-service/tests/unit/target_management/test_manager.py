"""The table of targets: a real Delta table in a folder; a cloud is a folder behind a fake."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, Schema, write_deltalake
from deltalake.exceptions import (
    CommitFailedError,
    DeltaError,
    DeltaProtocolError,
    SchemaMismatchError,
)

from config import load_settings
from errors import ConfigurationError, InvalidRequest
from target_management.delta_engine import DeltaEngine
from target_management.file_lock import file_lock
from target_management.interfaces import (
    ITargetManager,
    Target,
    TargetError,
    TargetSchemaMismatch,
    TargetStoreUnavailable,
)
from target_management.manager import TargetManager
from tests.support.clock import ManualClock
from tests.support.targets import InMemoryTargets

NOW = 1_795_348_800_000
AZURE = {"account_name": "acme", "account_key": "c2VjcmV0"}
BTC = Target(
    coin="BTC",
    exchange="crypto.com",
    exchange_id="cryptocom",
    market="BTC/USD",
    interval="5m",
    enabled=True,
    since=NOW - 14 * 86_400_000,
    created_at=NOW,
    last_updated=NOW,
)
ETH = replace(BTC, coin="ETH", market="ETH/USD", enabled=False)
COLUMNS = [
    "target_id", "coin", "exchange", "exchange_id", "market",
    "interval", "enabled", "since", "created_at", "last_updated",
]  # fmt: skip


class Cloud(DeltaEngine):
    """Keeps the tables of a cloud in a folder, and notes with which options they were opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[tuple[str, dict[str, str] | None]] = []
        self.fail_with: Exception | None = None

    def open(self, uri: str, storage_options: dict[str, str] | None) -> DeltaTable:
        return super().open(self._local(uri, storage_options), None)

    def create(
        self, uri: str, schema: Schema, storage_options: dict[str, str] | None, **layout: Any
    ) -> None:
        super().create(self._local(uri, storage_options), schema, None, **layout)

    def files(
        self,
        uri: str,
        storage_options: dict[str, str] | None,
        sizes: Mapping[str, int] | None = None,
    ) -> pyarrow.fs.FileSystem:
        return super().files(self._local(uri, storage_options), None, sizes)

    def _local(self, uri: str, storage_options: dict[str, str] | None) -> str:
        self.seen.append((uri, storage_options))
        if self.fail_with is not None:
            raise self.fail_with
        return str(self.folder / uri.partition("://")[2])


class BusyTable(DeltaEngine):
    """A table that another process changes each time between being opened and being written."""

    def __init__(self, conflicts: int) -> None:
        self.conflicts = conflicts

    def open(self, uri: str, storage_options: dict[str, str] | None) -> DeltaTable:
        table = super().open(uri, storage_options)
        if self.conflicts > 0:
            self.conflicts -= 1
            write_deltalake(uri, as_arrow(replace(ETH, coin=f"C{self.conflicts}")), mode="append")
        return table


class Failing(DeltaEngine):
    """A library that answers everything with one error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def open(self, uri: str, storage_options: dict[str, str] | None) -> DeltaTable:
        raise self.error


def as_arrow(target: Target) -> pa.Table:
    schema = pa.schema(
        [
            pa.field(
                name,
                pa.bool_()
                if name == "enabled"
                else pa.int64()
                if name in COLUMNS[7:]
                else pa.string(),
                nullable=False,
            )
            for name in COLUMNS
        ]
    )
    return pa.table({name: [getattr(target, name)] for name in COLUMNS}, schema=schema)


def stored(path: Path) -> list[dict[str, Any]]:
    """What the files of the table hold, read without the manager."""
    files = DeltaTable(str(path)).file_uris()
    rows = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    return sorted(rows, key=lambda row: str(row["target_id"]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "targets_delta"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW + 1000)


@pytest.fixture
async def manager(path: Path, clock: ManualClock) -> AsyncIterator[TargetManager]:
    manager = TargetManager("local", str(path), None, clock)
    await manager.open()
    yield manager
    await manager.close()


async def no_pause(seconds: float) -> None:
    """Back-off that takes no time."""


# Set-up.


async def test_local_settings_give_a_table_below_the_storage_root(
    tmp_path: Path, clock: ManualClock
) -> None:
    settings = load_settings(storage_root=str(tmp_path))
    manager = TargetManager.from_settings(settings, clock)
    await manager.open()
    assert await manager.add_target(BTC)
    assert DeltaTable.is_deltatable(str(tmp_path / "targets_delta"))
    await manager.close()


async def test_azure_settings_reach_the_library_with_their_options(
    tmp_path: Path, clock: ManualClock
) -> None:
    settings = load_settings(
        target_storage_type="azure",
        target_table_path="az://trade/targets_delta",
        azure_storage_options=json.dumps(AZURE),
    )
    assert isinstance(TargetManager.from_settings(settings, clock), ITargetManager)
    cloud = Cloud(tmp_path)
    manager = TargetManager("azure", "az://trade/targets_delta", AZURE, clock, engine=cloud)
    await manager.open()
    assert await manager.add_target(BTC)
    assert await manager.list_targets() == [BTC]
    for uri, options in cloud.seen:
        assert uri == "az://trade/targets_delta"
        assert options is not None
        assert options.items() >= AZURE.items()
    await manager.close()


async def test_users_options_win_over_the_patience_set_for_azure(
    tmp_path: Path, clock: ManualClock
) -> None:
    cloud = Cloud(tmp_path)
    options = {**AZURE, "max_retries": "7"}
    manager = TargetManager("azure", "az://trade/targets", options, clock, engine=cloud)
    await manager.open()
    seen = cloud.seen[0][1]
    assert seen is not None
    assert (seen["max_retries"], seen["retry_timeout"]) == ("7", "15s")
    await manager.close()


async def test_a_missing_local_table_is_made_with_its_schema(
    manager: TargetManager, path: Path
) -> None:
    fields = {field.name: str(field.type) for field in DeltaTable(str(path)).schema().fields}
    assert list(fields) == COLUMNS
    assert fields["enabled"] == 'PrimitiveType("boolean")'
    for name in ("since", "created_at", "last_updated"):
        assert fields[name] == 'PrimitiveType("long")'
    assert await manager.list_targets() == []


async def test_a_missing_azure_table_is_made(tmp_path: Path, clock: ManualClock) -> None:
    manager = TargetManager("azure", "az://t/targets", AZURE, clock, engine=Cloud(tmp_path))
    await manager.open()
    assert DeltaTable.is_deltatable(str(tmp_path / "t/targets"))
    await manager.close()


async def test_opening_again_keeps_what_is_there(
    manager: TargetManager, path: Path, clock: ManualClock
) -> None:
    await manager.add_target(BTC)
    again = TargetManager("local", str(path), None, clock)
    await again.open()
    assert await again.get_target(BTC.target_id) == BTC
    await again.close()


async def test_opening_merges_the_small_files_that_many_writes_left(
    manager: TargetManager, path: Path
) -> None:
    targets = [replace(BTC, coin=f"C{number:02}") for number in range(34)]
    for target in targets:
        write_deltalake(str(path), as_arrow(target), mode="append")
    await manager.open()
    assert len(DeltaTable(str(path)).file_uris()) == 1
    assert await manager.list_targets() == targets


# Rows.


async def test_an_added_target_is_one_row_of_the_table(manager: TargetManager, path: Path) -> None:
    assert await manager.add_target(BTC) is True
    assert stored(path) == [
        {
            "target_id": "crypto.com:BTC:5m",
            "coin": "BTC",
            "exchange": "crypto.com",
            "exchange_id": "cryptocom",
            "market": "BTC/USD",
            "interval": "5m",
            "enabled": True,
            "since": BTC.since,
            "created_at": NOW,
            "last_updated": NOW,
        }
    ]


async def test_adding_a_target_that_is_there_changes_nothing(
    manager: TargetManager, path: Path
) -> None:
    await manager.add_target(BTC)
    version = DeltaTable(str(path)).version()
    assert await manager.add_target(replace(BTC, enabled=False, since=0)) is False
    assert await manager.list_targets() == [BTC]
    assert DeltaTable(str(path)).version() <= version + 1


async def test_names_with_quotes_are_names_like_others(manager: TargetManager) -> None:
    odd = replace(BTC, coin="O'X\"; --", market="O'X/USD")
    await manager.add_target(odd)
    await manager.add_target(BTC)
    assert await manager.get_target(odd.target_id) == odd
    updated = await manager.update_target(odd.target_id, market="O''Y/USD")
    assert updated is not None
    assert updated.market == "O''Y/USD"
    assert await manager.delete_target(odd.target_id)
    assert await manager.list_targets() == [BTC]


async def test_an_update_changes_its_row_alone_and_tells_when(
    manager: TargetManager, clock: ManualClock, path: Path
) -> None:
    await manager.add_target(BTC)
    await manager.add_target(ETH)
    updated = await manager.update_target(BTC.target_id, enabled=False, since=5, market="BTC/EUR")
    assert updated == replace(
        BTC, enabled=False, since=5, market="BTC/EUR", last_updated=clock.now_ms()
    )
    assert await manager.list_targets() == [updated, ETH]
    assert [row["since"] for row in stored(path)] == [5, ETH.since]


async def test_an_update_to_what_is_there_leaves_the_row_as_it_is(
    manager: TargetManager, path: Path
) -> None:
    await manager.add_target(BTC)
    version = DeltaTable(str(path)).version()
    assert await manager.update_target(BTC.target_id, enabled=True) == BTC
    assert DeltaTable(str(path)).version() == version


async def test_an_update_of_no_row_gives_none(manager: TargetManager) -> None:
    await manager.add_target(ETH)
    assert await manager.update_target(BTC.target_id, enabled=False) is None
    assert await manager.list_targets() == [ETH]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"coin": "ETH"},
        {"enabled": True, "last_updated": 1},
        {"enabled": 1},
        {"since": True},
        {"since": "1"},
        {"since": None},
        {"market": ""},
    ],
)
async def test_an_update_of_anything_else_is_refused_before_the_table_is_asked(
    clock: ManualClock, changes: dict[str, Any]
) -> None:
    unopened: list[ITargetManager] = [
        TargetManager("local", "/nowhere/at/all", None, clock),
        InMemoryTargets(BTC),
    ]
    for manager in unopened:
        with pytest.raises(InvalidRequest, match=r"enabled .* since .* market"):
            await manager.update_target(BTC.target_id, **changes)


async def test_a_deleted_target_is_gone_and_the_others_stay(
    manager: TargetManager, path: Path
) -> None:
    await manager.add_target(BTC)
    await manager.add_target(ETH)
    assert await manager.delete_target(BTC.target_id) is True
    assert await manager.delete_target(BTC.target_id) is False
    assert [row["coin"] for row in stored(path)] == ["ETH"]
    assert await manager.delete_target(ETH.target_id) is True
    assert await manager.list_targets() == []
    assert await manager.add_target(BTC) is True


async def test_a_target_is_found_by_its_id(manager: TargetManager) -> None:
    await manager.add_target(BTC)
    await manager.add_target(ETH)
    assert await manager.get_target("crypto.com:ETH:5m") == ETH
    assert await manager.get_target("crypto.com:SOL:5m") is None


async def test_targets_are_listed_by_id_and_filtered(manager: TargetManager) -> None:
    hourly = replace(BTC, interval="1h", exchange="binance", exchange_id="binance")
    for target in (ETH, BTC, hourly):
        await manager.add_target(target)
    fake = InMemoryTargets(ETH, BTC, hourly)
    both: list[ITargetManager] = [manager, fake]
    for targets in both:
        assert await targets.list_targets() == [hourly, BTC, ETH]
        assert await targets.list_targets(enabled=True) == [hourly, BTC]
        assert await targets.list_targets(enabled=False) == [ETH]
        assert await targets.list_targets(coin="BTC") == [hourly, BTC]
        assert await targets.list_targets(coin="BTC", exchange="binance") == [hourly]
        assert await targets.list_targets(exchange="coinbase") == []


# Several writers.


async def test_many_tasks_of_many_managers_adding_one_target_leave_one_row(
    path: Path, clock: ManualClock
) -> None:
    managers = [TargetManager("local", str(path), None, clock) for _ in range(4)]
    await asyncio.gather(*(manager.open() for manager in managers))
    added = await asyncio.gather(
        *(manager.add_target(BTC) for manager in managers for _ in range(2))
    )
    assert sorted(added) == [False] * 7 + [True]
    assert len(stored(path)) == 1
    for manager in managers:
        await manager.close()


async def test_writers_without_a_lock_retry_until_every_row_is_there(
    tmp_path: Path, clock: ManualClock
) -> None:
    managers = [
        TargetManager(
            "azure", "az://t/targets", AZURE, clock,
            engine=Cloud(tmp_path), jitter=random.Random(seed),
        )
        for seed in range(4)
    ]  # fmt: skip
    await managers[0].open()
    targets = [replace(BTC, coin=f"C{number}") for number in range(4)]
    await asyncio.gather(
        *(m.add_target(t) for m, t in zip(managers, targets, strict=True)),
        *(m.add_target(BTC) for m in managers),
    )
    assert await managers[0].list_targets() == [BTC, *targets]
    for manager in managers:
        await manager.close()


async def test_a_lost_race_is_run_again_after_a_growing_pause(
    manager: TargetManager, path: Path, clock: ManualClock
) -> None:
    pauses: list[float] = []

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    busy = TargetManager(
        "local", str(path), None, clock,
        engine=BusyTable(conflicts=5), jitter=random.Random(1), sleep=note,
    )  # fmt: skip
    await manager.add_target(BTC)
    assert await busy.delete_target(BTC.target_id) is True
    assert await manager.get_target(BTC.target_id) is None
    assert len(await manager.list_targets()) == 5
    assert len(pauses) == 5
    for attempt, pause in enumerate(pauses):
        assert 0.5 <= pause / (0.02 * 2**attempt) <= 1.5
    await busy.close()


async def test_an_add_that_loses_the_race_to_the_same_target_adds_nothing(
    manager: TargetManager, path: Path, clock: ManualClock
) -> None:
    rival = replace(ETH, coin="C0")
    busy = TargetManager(
        "local", str(path), None, clock, engine=BusyTable(conflicts=1), sleep=no_pause
    )
    assert await busy.add_target(replace(rival, enabled=True)) is False
    assert await manager.list_targets() == [rival]
    assert len(stored(path)) == 1
    await busy.close()


async def test_a_race_that_is_never_won_ends_as_unavailable(path: Path, clock: ManualClock) -> None:
    manager = TargetManager(
        "local", str(path), None, clock,
        engine=Failing(CommitFailedError("Failed to commit transaction: 0")), sleep=no_pause,
    )  # fmt: skip
    with pytest.raises(TargetStoreUnavailable, match="20 times in a row"):
        await manager.add_target(BTC)
    await manager.close()


async def test_a_writer_waits_for_the_lock_and_gives_up_in_time(
    path: Path, clock: ManualClock, manager: TargetManager
) -> None:
    impatient = TargetManager("local", str(path), None, clock, timeout_s=0.05)
    with file_lock(Path(f"{path}.lock"), 1):
        with pytest.raises(TargetStoreUnavailable, match=r"within 0\.05 s"):
            await impatient.add_target(BTC)
        # Readers need no lock.
        assert await manager.list_targets() == []
    assert await manager.add_target(BTC) is True
    await impatient.close()


# Wrong settings and failures.


@pytest.mark.parametrize(
    ("storage_type", "table_path", "options", "setting"),
    [
        ("azure", "az://trade/targets", None, "AZURE_STORAGE_OPTIONS"),
        ("azure", "az://trade/targets", {}, "AZURE_STORAGE_OPTIONS"),
        ("azure", "./targets", AZURE, "TARGET_TABLE_PATH"),
        ("local", "az://trade/targets", None, "TARGET_TABLE_PATH"),
        ("s3", "s3://trade/targets", AZURE, "TARGET_STORAGE_TYPE"),
    ],
)
def test_settings_that_do_not_fit_each_other_name_the_one_to_change(
    clock: ManualClock,
    storage_type: str,
    table_path: str,
    options: dict[str, str] | None,
    setting: str,
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{setting}: takes"):
        TargetManager(storage_type, table_path, options, clock)


def test_azure_targets_without_options_stop_the_start(clock: ManualClock) -> None:
    settings = load_settings(target_storage_type="azure", target_table_path="az://trade/targets")
    with pytest.raises(ConfigurationError, match="AZURE_STORAGE_OPTIONS"):
        TargetManager.from_settings(settings, clock)


async def test_an_azure_that_cannot_be_reached_is_unavailable_and_no_secret_is_told(
    tmp_path: Path, clock: ManualClock
) -> None:
    cloud = Cloud(tmp_path)
    cloud.fail_with = OSError(
        "\x1b[31mGeneric MicrosoftAzure error\x1b[0m GET https://acme/t?sv=1&sig=TOPSECRET refused"
    )
    manager = TargetManager("azure", "az://t/targets", AZURE, clock, engine=cloud)
    for call in (manager.open(), manager.list_targets(), manager.add_target(BTC)):
        with pytest.raises(TargetStoreUnavailable, match="az://t/targets") as failure:
            await call
        assert failure.value.retryable
        assert "TOPSECRET" not in str(failure.value)
        assert "\x1b" not in str(failure.value)
        assert failure.value.__cause__ is None
    await manager.close()


async def test_a_table_of_another_schema_is_refused_with_the_difference(
    path: Path, clock: ManualClock
) -> None:
    path.parent.mkdir(parents=True)
    other = as_arrow(BTC).drop_columns(["since"]).append_column("colour", pa.array(["red"]))
    at = other.column_names.index("enabled")
    write_deltalake(str(path), other.set_column(at, "enabled", pa.array(["yes"])))
    manager = TargetManager("local", str(path), None, clock)
    for call in (manager.open(), manager.add_target(BTC), manager.list_targets()):
        with pytest.raises(
            TargetSchemaMismatch,
            match="since is missing; colour is unknown; enabled is string instead of boolean",
        ):
            await call
    await manager.close()


async def test_a_table_that_is_gone_is_unavailable_until_it_is_made_again(
    path: Path, clock: ManualClock
) -> None:
    manager = TargetManager("local", str(path), None, clock)
    with pytest.raises(TargetStoreUnavailable, match="no table"):
        await manager.list_targets()
    await manager.open()
    assert await manager.list_targets() == []
    await manager.close()


async def test_a_folder_that_cannot_be_made_is_unavailable(
    tmp_path: Path, clock: ManualClock
) -> None:
    (tmp_path / "file").write_bytes(b"")
    manager = TargetManager("local", str(tmp_path / "file/targets"), None, clock)
    with pytest.raises(TargetStoreUnavailable, match="check the path"):
        await manager.open()
    await manager.close()


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (SchemaMismatchError("number of fields does not match"), TargetSchemaMismatch),
        (DeltaProtocolError("reader version 9"), TargetError),
        (DeltaError("Generic error"), TargetError),
        (OSError("connection refused"), TargetStoreUnavailable),
        (ZeroDivisionError("a mistake of ours"), ZeroDivisionError),
    ],
)
async def test_errors_of_the_library_become_ours_by_their_type_and_unknown_ones_stay(
    path: Path, clock: ManualClock, raised: Exception, told: type[Exception]
) -> None:
    manager = TargetManager("local", str(path), None, clock, engine=Failing(raised))
    for call in (manager.list_targets(), manager.add_target(BTC), manager.open()):
        with pytest.raises(Exception, match=str(raised)) as failure:
            await call
        assert type(failure.value) is told
    await manager.close()


async def test_a_closed_manager_says_so(manager: TargetManager) -> None:
    await manager.close()
    with pytest.raises(TargetStoreUnavailable, match="closed"):
        await manager.list_targets()
