"""What the table of sealed candles promises, on the local disk."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, Field, Schema
from deltalake.schema import PrimitiveType

from domain.candle import Candle
from domain.entry import Entry, Source
from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from errors import InvalidRequest
from historical.candle_table import CandleTable
from historical.interfaces import CandleTableMismatch, CandleTableUnavailable
from storage.path_utility import day_start
from target_management.delta_engine import DeltaEngine
from tests.support.entries import BTC, make_entry

DAY_MS = 86_400_000
NEW_YEAR = date(2026, 1, 1)
ALL = TimeRange(0, 2**62)


def day(number: int) -> date:
    """A day of 2026, counted from zero; of the years around it for others."""
    return NEW_YEAR + timedelta(days=number)


def range_of(first: date, days: int = 1) -> TimeRange:
    return TimeRange(day_start(first), day_start(first) + days * DAY_MS)


def entries_of(
    when: date, *, series: Series = BTC, seed: int = 0, count: int | None = None
) -> list[Entry]:
    """Entries of a day, all of its periods or so many, whose values take every bit."""
    rng = Random(f"{when} {series} {seed}")
    step = series.interval.milliseconds
    sources: tuple[Source, ...] = ("rest", "stream")
    entries = []
    for at in range(min(count if count is not None else 2**31, max(1, DAY_MS // step))):
        low, first, last, high = sorted(rng.uniform(0.0001, 90_000) for _ in range(4))
        candle = Candle(day_start(when) + at * step, first, high, low, last, rng.expovariate(1))
        entries.append(
            Entry(series, "BTC/USD", candle, None, rng.choice(sources), rng.randint(1, 3))
        )
    return entries


def table_at(path: Path) -> CandleTable:
    table = CandleTable(DeltaEngine(), str(path), None)
    table.prepare()
    return table


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "candles_delta"


@pytest.fixture
def table(path: Path) -> CandleTable:
    return table_at(path)


def test_a_table_without_a_sealed_day_has_nothing(table: CandleTable) -> None:
    candles = table.read(BTC, ALL)
    assert len(candles) == 0
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
    candles = table.read(BTC, wanted)
    expected = [entry.candle for entry in entries[10:251]]
    columns = (
        candles.timestamp, candles.open, candles.high, candles.low, candles.close, candles.volume,
    )  # fmt: skip
    found = [Candle(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    assert found == expected
    assert candles.ranges == (wanted,)
    assert not candles.close.flags.writeable


def test_the_book_of_an_entry_is_left_to_its_document(table: CandleTable) -> None:
    entry = make_entry(day_start(day(0)), book=True, source="stream")
    table.seal(BTC, {day(0): [entry]})
    assert table.read_entries(BTC, ALL)[1] == [entry.with_order_book(None)]


def test_a_day_without_any_candle_is_sealed_too(table: CandleTable, path: Path) -> None:
    table.seal(BTC, {day(0): entries_of(day(0)), day(1): [], day(3): []})
    for opened in (table, table_at(path)):
        assert opened.sealed(BTC, ALL) == [range_of(day(0), 2), range_of(day(3))]
        assert opened.read(BTC, range_of(day(1))).ranges == (range_of(day(1)),)
        assert len(opened.read(BTC, range_of(day(1), 5))) == 0


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
    assert len(table.read(BTC, ALL)) == 0


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
