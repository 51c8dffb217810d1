"""What the table of sealed candles promises, on the local disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, Field, Schema
from deltalake.schema import PrimitiveType
from structlog.testing import capture_logs

from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from errors import InvalidRequest
from historical.candle_files import SealedFile
from historical.candle_log import CandleLog, WriteConflict
from historical.candle_table import CandleTable
from historical.interfaces import CandleTableMismatch, CandleTableUnavailable
from storage.path_utility import day_start
from target_management.delta_engine import DeltaEngine
from tests.support.entries import BTC, make_entry
from tests.support.sealing import ALL, day, entries_of, range_of, table_at


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "candles_delta"


@pytest.fixture
def table(path: Path) -> CandleTable:
    return table_at(path)


def test_a_table_without_a_sealed_day_has_nothing(table: CandleTable) -> None:
    candles = table.read(BTC, ALL)
    assert len(candles.candles) == 0
    assert candles.ranges == ()
    assert table.read_entries(BTC, ALL) == ((), [])
    assert table.sealed(BTC, ALL) == []


def test_entries_of_sealed_days_come_back_bit_for_bit(table: CandleTable) -> None:
    days = {day(at): entries_of(day(at)) for at in range(3)}
    table.seal(BTC, days)
    ranges, entries = table.read_entries(BTC, ALL)
    assert entries == [entry for of_day in days.values() for entry in of_day]
    assert ranges == (range_of(day(0), 3),)


def test_columns_have_the_candles_of_a_range(table: CandleTable) -> None:
    entries = entries_of(day(0))
    table.seal(BTC, {day(0): entries})
    wanted = TimeRange(entries[10].timestamp, entries[250].timestamp + 1)
    found = table.read(BTC, wanted)
    assert list(found.candles) == [entry.candle for entry in entries[10:251]]
    assert found.ranges == (wanted,)
    assert not found.candles.close.flags.writeable


def test_the_book_of_an_entry_is_left_to_its_document(table: CandleTable) -> None:
    entry = make_entry(day_start(day(0)), book=True, source="stream")
    table.seal(BTC, {day(0): [entry]})
    assert table.read_entries(BTC, ALL)[1] == [entry.with_order_book(None)]


def test_a_day_without_any_candle_is_sealed_too(table: CandleTable, path: Path) -> None:
    table.seal(BTC, {day(0): entries_of(day(0)), day(1): [], day(3): []})
    for opened in (table, table_at(path)):
        assert opened.sealed(BTC, ALL) == [range_of(day(0), 2), range_of(day(3))]
        assert opened.read(BTC, range_of(day(1))).ranges == (range_of(day(1)),)
        assert len(opened.read(BTC, range_of(day(1), 5)).candles) == 0


def test_sealing_again_replaces_just_those_days(table: CandleTable) -> None:
    old = {day(at): entries_of(day(at)) for at in range(3)}
    new = entries_of(day(1), seed=1, count=100)
    table.seal(BTC, old)
    table.seal(BTC, {day(1): new})
    table.seal(BTC, {day(1): new})
    assert table.read_entries(BTC, ALL)[1] == [*old[day(0)], *new, *old[day(2)]]
    assert table.sealed(BTC, ALL) == [range_of(day(0), 3)]


def test_days_of_several_years_are_sealed_in_one_commit(table: CandleTable, path: Path) -> None:
    days = {day(at): entries_of(day(at)) for at in (-366, -1, 0, 364, 365)}
    before = DeltaTable(str(path)).version()
    table.seal(BTC, days)
    assert DeltaTable(str(path)).version() == before + 1
    assert table.read_entries(BTC, ALL)[1] == [entry for one in days.values() for entry in one]


def test_days_that_are_sealed_out_of_order_are_read_in_order(table: CandleTable) -> None:
    days = {day(at): entries_of(day(at)) for at in range(6)}
    for at in (3, 0, 5):
        table.seal(BTC, {day(at): days[day(at)]})
    table.seal(BTC, {day(at): days[day(at)] for at in (4, 1, 2)})
    assert table.read_entries(BTC, ALL)[1] == [entry for one in days.values() for entry in one]


def test_a_day_that_is_unsealed_is_not_served_and_the_others_are(
    table: CandleTable, path: Path
) -> None:
    days = {day(at): entries_of(day(at)) for at in range(3)}
    table.seal(BTC, days)
    table.unseal(BTC, [day(1)])
    for opened in (table, table_at(path)):
        assert opened.sealed(BTC, ALL) == [range_of(day(0)), range_of(day(2))]
        ranges, entries = opened.read_entries(BTC, ALL)
        assert ranges == (range_of(day(0)), range_of(day(2)))
        assert entries == [*days[day(0)], *days[day(2)]]
    table.seal(BTC, {day(1): days[day(1)]})
    assert table.sealed(BTC, ALL) == [range_of(day(0), 3)]


def test_other_engines_see_no_row_of_a_day_that_is_unsealed(table: CandleTable, path: Path) -> None:
    days = {day(at): entries_of(day(at)) for at in range(3)}
    table.seal(BTC, days)
    table.unseal(BTC, [day(1)])
    files = DeltaTable(str(path)).file_uris()
    rows = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    assert [row["timestamp"] for row in rows] == [
        entry.timestamp for at in (0, 2) for entry in days[day(at)]
    ]


def test_unsealing_what_is_not_sealed_makes_no_commit(table: CandleTable, path: Path) -> None:
    table.seal(BTC, {day(0): entries_of(day(0))})
    before = DeltaTable(str(path)).version()
    table.unseal(BTC, [day(1), day(400)])
    table.unseal(Series("binance", "BTC", BTC.interval), [day(0)])
    assert DeltaTable(str(path)).version() == before


def test_unsealing_everything_leaves_nothing(table: CandleTable) -> None:
    table.seal(BTC, {day(at): entries_of(day(at)) for at in range(3)})
    table.unseal(BTC, [day(at) for at in range(3)])
    assert table.sealed(BTC, ALL) == []
    assert len(table.read(BTC, ALL).candles) == 0


@pytest.mark.parametrize(
    "other",
    [
        Series("binance", "BTC", BTC.interval),
        Series("crypto.com", "BTC", Interval.parse("1h")),
        Series("crypto.com", "BTC/EUR", BTC.interval),
        Series("crypto.com", "币安人生", BTC.interval),
        Series("crypto.com", "A %2F'=~ b", BTC.interval),
    ],
    ids=str,
)
def test_series_are_apart_whatever_they_are_called(table: CandleTable, other: Series) -> None:
    mine, others = entries_of(day(0)), entries_of(day(0), series=other)
    table.seal(BTC, {day(0): mine})
    table.seal(other, {day(0): others, day(1): []})
    table.unseal(other, [day(1)])
    assert table.read_entries(BTC, ALL)[1] == mine
    assert table.read_entries(other, ALL)[1] == others
    assert table.sealed(other, ALL) == [range_of(day(0))]


def test_a_period_longer_than_a_day_belongs_to_the_day_it_opens_in(table: CandleTable) -> None:
    weekly = Series("crypto.com", "BTC", Interval.parse("1w"))
    monday = date(2026, 1, 5)
    entries = entries_of(monday, series=weekly)
    table.seal(weekly, {monday: entries, monday + timedelta(days=1): []})
    assert table.read_entries(weekly, ALL) == ((range_of(monday, 2),), entries)


def test_entries_of_another_day_or_series_or_out_of_order_are_refused(table: CandleTable) -> None:
    entries = entries_of(day(0))
    other = Series("binance", "BTC", BTC.interval)
    for days in ({day(1): entries}, {day(0): entries[::-1]}, {day(0): [entries[0], entries[0]]}):
        with pytest.raises(InvalidRequest):
            table.seal(BTC, days)
    with pytest.raises(InvalidRequest):
        table.seal(other, {day(0): entries})
    assert table.sealed(BTC, ALL) == []


def test_one_handle_sees_at_once_what_another_one_commits(table: CandleTable, path: Path) -> None:
    other = table_at(path)
    entries = entries_of(day(0))
    table.seal(BTC, {day(0): entries})
    assert other.read_entries(BTC, ALL)[1] == entries
    other.unseal(BTC, [day(0)])
    assert table.sealed(BTC, ALL) == []
    other.seal(BTC, {day(1): entries_of(day(1))})
    table.seal(BTC, {day(2): []})
    assert other.sealed(BTC, ALL) == [range_of(day(1), 2)]


def test_a_table_with_another_schema_is_refused_and_the_difference_named(path: Path) -> None:
    columns = {"exchange": "string", "timestamp": "string", "price": "double"}
    DeltaTable.create(
        str(path),
        Schema([Field(name, PrimitiveType(kind)) for name, kind in columns.items()]),
        partition_by=["exchange"],
    )
    with pytest.raises(CandleTableMismatch) as told:
        table_at(path)
    for difference in (
        "coin is missing",
        "price is unknown",
        "timestamp is string instead of long",
        "exchange may be null",
        "partitioned by exchange instead of exchange, coin, interval, year",
    ):
        assert difference in told.value.message


def test_a_table_that_was_deleted_is_told_as_unavailable(table: CandleTable, path: Path) -> None:
    table.seal(BTC, {day(0): []})
    for file in path.rglob("*.json"):
        file.unlink()
    with pytest.raises(CandleTableUnavailable, match="no table of candles"):
        table.read(BTC, ALL)


def files_of(path: Path) -> list[Path]:
    """The data files that are of the table now."""
    return [Path(uri) for uri in DeltaTable(str(path)).file_uris()]


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"PAR1 no more")])
def test_a_damaged_file_leaves_its_days_to_the_documents_until_they_are_sealed_again(
    table: CandleTable, path: Path, damage: Callable[[Path], object]
) -> None:
    first, second = entries_of(day(0)), entries_of(day(1))
    table.seal(BTC, {day(0): first})
    (damaged,) = files_of(path)
    table.seal(BTC, {day(1): second})
    damage(damaged)
    with capture_logs() as logs:
        assert table.read_entries(BTC, ALL) == ((range_of(day(1)),), second)
        assert table.read_entries(BTC, ALL) == ((range_of(day(1)),), second)
    assert [entry["event"] for entry in logs] == ["candle_file_damaged"]
    assert table.sealed(BTC, ALL) == [range_of(day(1))]
    table.seal(BTC, {day(0): first})
    assert table.read_entries(BTC, ALL) == ((range_of(day(0), 2),), [*first, *second])
    assert damaged not in files_of(path)


def test_a_day_of_a_damaged_file_can_be_unsealed(table: CandleTable, path: Path) -> None:
    table.seal(BTC, {day(at): entries_of(day(at)) for at in range(3)})
    (damaged,) = files_of(path)
    damaged.unlink()
    table.unseal(BTC, [day(1)])
    assert table.sealed(BTC, ALL) == []
    assert files_of(path) == []


def test_small_files_of_the_running_year_become_few_and_those_of_a_past_year_one(
    table: CandleTable, path: Path
) -> None:
    days = {day(at): entries_of(day(at)) for at in range(-3, 12)}
    for one, entries in days.items():
        table.seal(BTC, {one: entries})
    table.seal(BTC, {day(20): []})
    table.tidy()
    assert len(files_of(path)) == 2
    for opened in (table, table_at(path)):
        assert opened.read_entries(BTC, ALL)[1] == [one for mine in days.values() for one in mine]
        assert opened.sealed(BTC, ALL) == [range_of(day(-3), 15), range_of(day(20))]


def test_tidying_what_is_tidy_makes_no_commit(table: CandleTable, path: Path) -> None:
    table.seal(BTC, {day(0): entries_of(day(0))})
    before = DeltaTable(str(path)).version()
    table.tidy()
    assert DeltaTable(str(path)).version() == before


def test_files_that_left_the_table_are_removed_when_nobody_can_read_them_any_more(
    table: CandleTable, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = Series("crypto.com", "币/ %2F'=", BTC.interval)
    entries = entries_of(day(0), series=odd, count=2)
    table.seal(odd, {day(0): entries})
    for seed in range(60):
        table.seal(BTC, {day(0): entries_of(day(0), seed=seed, count=3)})
    table.tidy()
    assert len(list(path.glob("exchange=*/**/*.parquet"))) == 61
    monkeypatch.setattr("historical.candle_log._RETENTION_HOURS", 0)
    table.tidy()
    assert len(list(path.glob("exchange=*/**/*.parquet"))) == 2
    before = DeltaTable(str(path)).version()
    table.tidy()
    assert DeltaTable(str(path)).version() == before
    for opened in (table, table_at(path)):
        assert opened.read_entries(odd, ALL)[1] == entries
        assert len(opened.read(BTC, ALL).candles) == 3


def test_a_reader_of_before_goes_on_when_the_log_is_cleared(
    table: CandleTable, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = table_at(path)
    reader.sealed(BTC, ALL)
    for at in range(30):
        table.seal(BTC, {day(at): []})
    DeltaTable(str(path)).alter.set_table_properties(
        {"delta.logRetentionDuration": "interval 0 seconds"}
    )
    table.tidy()
    assert not (path / "_delta_log" / f"{0:020}.json").exists()
    assert reader.sealed(BTC, ALL) == [range_of(day(0), 30)]


def test_a_file_of_another_writer_is_of_no_day_and_leaves_with_the_next_seal(
    table: CandleTable, path: Path
) -> None:
    table.seal(BTC, {day(at): entries_of(day(at)) for at in range(2)})
    DeltaTable(str(path)).optimize.z_order(["timestamp"])
    assert table.sealed(BTC, ALL) == []
    entries = entries_of(day(1))
    table.seal(BTC, {day(1): entries})
    assert table.read_entries(BTC, ALL) == ((range_of(day(1)),), entries)
    assert len(files_of(path)) == 1


def test_files_that_are_large_enough_are_not_written_again_by_merging(
    table: CandleTable, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("historical.candle_table._FULL_ROWS", 500)
    days = {day(at): entries_of(day(at)) for at in range(14)}
    table.seal(BTC, {day(at): days[day(at)] for at in (0, 1)})
    (large,) = files_of(path)
    for at in range(2, 14):
        table.seal(BTC, {day(at): days[day(at)]})
    table.tidy()
    assert large in files_of(path)
    assert len(files_of(path)) == 2
    assert table.read_entries(BTC, ALL)[1] == [one for mine in days.values() for one in mine]


def test_a_change_is_decided_anew_when_another_process_was_faster(
    table: CandleTable, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {day(at): entries_of(day(at)) for at in range(3)}
    table.seal(BTC, old)
    other = table_at(path)
    write, first = CandleLog.write, True

    def write_after_another(log: CandleLog, *file: Any) -> SealedFile:
        nonlocal first
        if first:
            first = False
            other.unseal(BTC, [day(2)])
            # A reader of this process has seen it: the handle is not that of the decision any more.
            table.sealed(BTC, ALL)
        return write(log, *file)

    monkeypatch.setattr(CandleLog, "write", write_after_another)
    new = entries_of(day(1), seed=1)
    table.seal(BTC, {day(1): new})
    assert table.read_entries(BTC, ALL) == ((range_of(day(0), 2),), [*old[day(0)], *new])


def test_whoever_reads_while_a_day_is_sealed_anew_gets_it_whole_as_it_was_or_is(
    table: CandleTable,
) -> None:
    contents = [entries_of(day(0), seed=seed) for seed in range(20)]
    table.seal(BTC, {day(0): contents[0]})
    sealed_all = Event()

    def read() -> list[int]:
        seen = []
        while not sealed_all.is_set():
            ranges, entries = table.read_entries(BTC, ALL)
            assert ranges == (range_of(day(0)),)
            seen.append(contents.index(entries))
        return seen

    with ThreadPoolExecutor(2) as threads:
        readers = [threads.submit(read) for _ in range(2)]
        try:
            for content in contents:
                table.seal(BTC, {day(0): content})
        finally:
            sealed_all.set()
        for reader in readers:
            seen = reader.result(timeout=30)
            assert seen == sorted(seen)
    assert table.read_entries(BTC, ALL)[1] == contents[-1]


READ = """
import json, sys
from pathlib import Path
from tests.support.entries import BTC
from tests.support.sealing import ALL, day, entries_of, table_at

table = table_at(Path(sys.argv[1]))
table.seal(BTC, {day(0): entries_of(day(0))})
table.seal(BTC, {day(1): []})
table.unseal(BTC, [day(1)])
table.tidy()
assert len(table.read(BTC, ALL).candles) == len(table.read_entries(BTC, ALL)[1]) == 288
print(json.dumps("pandas" in sys.modules))
"""


def test_neither_sealing_nor_reading_loads_pandas_or_ends_badly(path: Path) -> None:
    # A process of its own: reading in the library's other ways aborts it at its end.
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)],
        env={"PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        timeout=30,
        check=False,
    )
    assert (done.returncode, json.loads(done.stdout)) == (0, False)


@pytest.mark.parametrize("torn", [b"", b'{"commitInfo": {}}\n{"add": {"pa'])
def test_a_log_entry_that_the_power_cut_off_is_dropped(path: Path, torn: bytes) -> None:
    table_at(path).seal(BTC, {day(0): entries_of(day(0))})
    newest = max((path / "_delta_log").glob("*.json"))
    cut_off = newest.with_name(f"{int(newest.stem) + 1:020}.json")
    cut_off.write_bytes(torn)
    with capture_logs() as logs:
        table = table_at(path)
    assert [entry["event"] for entry in logs] == ["candle_log_entry_torn"]
    table.seal(BTC, {day(1): entries_of(day(1))})
    assert table.sealed(BTC, ALL) == [range_of(day(0), 2)]


def test_who_took_over_is_not_overtaken_by_what_was_read_before(path: Path) -> None:
    first, second = table_at(path), table_at(path)
    first.take_over()
    read_since = first.others
    second.take_over()
    with pytest.raises(WriteConflict, match="another process wrote"):
        first.seal(BTC, {day(0): entries_of(day(0))}, read_since=read_since)
    assert second.sealed(BTC, ALL) == []
    second.seal(BTC, {day(0): entries_of(day(0))}, read_since=second.others)
    assert second.sealed(BTC, ALL) == [range_of(day(0))]


def test_ones_own_commits_and_upkeep_are_none_of_others(path: Path) -> None:
    table = table_at(path)
    table.take_over()
    read_since = table.others
    for at in range(12):
        table.seal(BTC, {day(at): entries_of(day(at), count=2)}, read_since=read_since)
    table.unseal(BTC, [day(3)])
    table.tidy()
    table.seal(BTC, {day(3): []}, read_since=read_since)
    assert table.others == read_since


def test_what_may_be_sealed_is_known_without_a_look(path: Path) -> None:
    table = table_at(path)
    days = {day(at) for at in range(-1, 3)}
    # Nothing was looked at yet: nobody can say.
    assert table.known(BTC, days) == days
    table.take_over()
    assert table.known(BTC, days) == set()
    table.seal(BTC, {day(at): [] for at in (-1, 1)})
    assert table.known(BTC, days) == {day(-1), day(1)}
    table.unseal(BTC, [day(1)])
    assert table.known(BTC, days) == {day(-1)}


def test_a_commit_whose_answer_was_lost_leaves_it_open_what_is_sealed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_at(path)
    table.take_over()

    def lost(_: Path) -> None:
        raise OSError("no answer")

    with monkeypatch.context() as patched:
        patched.setattr("historical.candle_log.sync", lost)
        with pytest.raises(CandleTableUnavailable):
            table.seal(BTC, {day(0): []})
    assert table.known(BTC, [day(0)]) == {day(0)}
    table.unseal(BTC, [day(0)])
    assert table.sealed(BTC, ALL) == []
    assert table.known(BTC, [day(0)]) == set()


class Counting(DeltaEngine):
    """Counts the data files that are fetched as those of a cloud are."""

    def __init__(self) -> None:
        self.fetched = 0

    def files(
        self,
        uri: str,
        storage_options: dict[str, str] | None,
        sizes: Mapping[str, int] | None = None,
    ) -> Any:
        self.fetched += sizes is not None
        return super().files(uri, storage_options, sizes)


def test_a_file_of_a_cloud_is_fetched_once_for_the_pages_of_its_year(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Counting()
    table = CandleTable(engine, str(path), {})
    table.prepare()
    entries = entries_of(day(0))
    table.seal(BTC, {day(0): entries})
    for at in range(0, 288, 24):
        part = TimeRange(entries[at].timestamp, entries[at].timestamp + 7_200_000)
        assert list(table.read(BTC, part).candles) == [
            entry.candle for entry in entries[at : at + 24]
        ]
    assert engine.fetched == 1
    # What is kept is bounded.
    monkeypatch.setattr("historical.candle_log._MOST_RECENT_BYTES", 1)
    bounded = CandleTable(engine, str(path), {})
    for count in (2, 3):
        assert len(bounded.read(BTC, ALL).candles) == 288
        assert engine.fetched == count
