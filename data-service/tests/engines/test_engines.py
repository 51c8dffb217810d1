"""Other engines see in the table of candles what was sealed, and open only what they need."""

from __future__ import annotations

import csv
import io
import math
from datetime import UTC, date, datetime
from pathlib import Path
from urllib.parse import quote

import pytest
from deltalake import DeltaTable
from msgspec.structs import replace

from domain.entry import Entry
from domain.interval import Interval
from domain.series import Series
from historical.sealed_days import bits_of
from tests.engines.page import changed, copied, output_of, program_of, run_engine
from tests.support.sealing import entries_of, table_at

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TABLE = "data/candles_delta"
FILES = "exchange=*/**/*.parquet"
# The year of the page's queries as it stands there, and the same with another filter in its place.
YEAR = {
    "Polars": 'pl.col("year") == 2026',
    "DuckDB": "year = 2026",
    "Daft on Ray": '(col("year") == 2026)',
}
TWO_YEARS = {
    "Polars": 'pl.col("year") >= 2025',
    "DuckDB": "year >= 2025",
    "Daft on Ray": '(col("year") >= 2025)',
}
COIN_TOO = {
    "Polars": 'pl.col("year") == 2026, pl.col("coin") == "BTC"',
    "DuckDB": "year = 2026 AND coin = 'BTC'",
    "Daft on Ray": '(col("year") == 2026) & (col("coin") == "BTC")',
}
# From 3 January on: 1767398400000.
PART_OF_YEAR = {
    "Polars": 'pl.col("year") == 2026, pl.col("timestamp") >= 1767398400000',
    "DuckDB": 'year = 2026 AND "timestamp" >= 1767398400000',
}
engines = pytest.mark.parametrize("engine", list(YEAR))
Daily = dict[tuple[str, str, str], float]

# What processes of this one and of those it started listen on, by the files of Linux.
LISTENING = """
import pathlib

def children(pid):
    for tasks in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in tasks.read_text().split():
            yield child
            yield from children(child)

sockets = set()
for pid in ["self", *children("self")]:
    for link in pathlib.Path(f"/proc/{pid}/fd").glob("*"):
        try:
            sockets.add(str(link.readlink()))
        except FileNotFoundError:
            pass
for name in ("tcp", "tcp6"):
    for line in pathlib.Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
            print("listening", fields[1].split(":")[0])
"""
# 127.0.0.1 there, and the same in IPv6.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}


class Sealed:
    """A table made as the service makes it, and what of it other engines are to see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.days: dict[Series, dict[date, list[Entry]]] = {}
        self._table = table_at(folder / TABLE)

    def seal(self, series: Series, *days: date, seed: int = 0, traded: bool = True) -> None:
        made = {day: entries_of(day, series=series, seed=seed) for day in days}
        if not traded:
            made = {
                day: [replace(one, candle=replace(one.candle, volume=0.0)) for one in entries]
                for day, entries in made.items()
            }
        self._table.seal(series, made)
        self.days.setdefault(series, {}).update(made)

    def seal_nothing(self, series: Series, day: date) -> None:
        self._table.seal(series, {day: []})
        self.days[series][day] = []

    def unseal(self, series: Series, day: date) -> None:
        self._table.unseal(series, [day])
        del self.days[series][day]

    def tidy(self) -> None:
        self._table.tidy()

    def entries(self, interval: str, year: int, coin: str | None = None) -> list[Entry]:
        return [
            entry
            for series, days in self.days.items()
            if series.interval.name == interval and coin in {None, series.coin}
            for day, entries in days.items()
            if day.year == year
            for entry in entries
        ]

    def vwap(self, interval: str, year: int, coin: str | None = None) -> Daily:
        """The page's query, computed from the entries that were sealed."""
        amounts: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
        for entry in self.entries(interval, year, coin):
            candle, series = entry.candle, entry.series
            day = datetime.fromtimestamp(candle.timestamp / 1000, UTC).date().isoformat()
            typical = (candle.high + candle.low + candle.close) / 3
            amounts.setdefault((series.exchange, series.coin, day), []).append(
                (typical * candle.volume, candle.volume)
            )
        return {
            key: math.fsum(amount for amount, _ in pairs) / math.fsum(size for _, size in pairs)
            for key, pairs in amounts.items()
            if any(size for _, size in pairs)
        }


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    made = Sealed(tmp_path_factory.mktemp("engines"))
    markets = [
        ("crypto.com", "BTC"), ("crypto.com", "ETH/EUR"), ("binance", "BTC"),
        ("binance", "A B%2F"), ("coinbase", "1INCH"),
    ]  # fmt: skip
    old, last = [date(2025, 12, 30), date(2025, 12, 31)], date(2026, 1, 1)
    for exchange, coin in markets:
        for interval in ("5m", "1h"):
            series = Series(exchange, coin, Interval.parse(interval))
            made.seal(series, *old)
            for day in (1, 2, 3):
                made.seal(series, date(2026, 1, day))
            made.seal_nothing(series, date(2026, 1, 4))
    # Behind a checkpoint come further entries of the log.
    made.tidy()
    btc = Series("crypto.com", "BTC", Interval.parse("5m"))
    made.unseal(btc, last)
    made.seal(btc, last, seed=1)
    made.unseal(btc, date(2026, 1, 2))
    for exchange, coin in markets[1:3]:
        made.seal(Series(exchange, coin, Interval.parse("5m")), date(2026, 1, 5), traded=False)
    return made


def daily_of(output: str) -> Daily:
    rows = list(csv.DictReader(io.StringIO(output)))
    daily = {(row["exchange"], row["coin"], row["day"]): float(row["vwap"]) for row in rows}
    assert len(daily) == len(rows)
    return daily


def damage_all_but(folder: Path, interval: str, year: int, coin: str | None = None) -> None:
    """Spoil every data file but those that the log names for these partitions.

    Others are deleted or no Parquet any more, by turns; those that left the table too.
    """
    root = folder / TABLE
    places = f"coin={'*' if coin is None else quote(coin, safe='')}/interval={interval}/year={year}"
    named = {Path(file) for file in DeltaTable(root).file_uris()}
    kept = named & set(root.glob(f"exchange=*/{places}/*.parquet"))
    others = sorted(set(root.glob(FILES)) - kept)
    assert kept
    assert named - kept
    for number, file in enumerate(others):
        if number % 2:
            file.unlink()
        else:
            file.write_bytes(b"no Parquet")


def test_the_table_has_files_that_left_it_a_checkpoint_and_a_day_without_rows(
    sealed: Sealed,
) -> None:
    root = sealed.folder / TABLE
    named = {Path(file) for file in DeltaTable(root).file_uris()}
    there = set(root.glob(FILES))
    assert named < there
    assert (root / "_delta_log/_last_checkpoint").exists()
    expected = sealed.vwap("5m", 2026)
    days = {day for exchange, coin, day in expected if (exchange, coin) == ("crypto.com", "BTC")}
    assert days == {"2026-01-01", "2026-01-03"}
    assert len(expected) == 14


@engines
async def test_it_sees_just_the_candles_that_are_sealed(sealed: Sealed, engine: str) -> None:
    output = await output_of(program_of(engine), sealed.folder)
    daily = daily_of(output)
    assert daily == pytest.approx(sealed.vwap("5m", 2026), rel=1e-12)
    assert list(daily) == sorted(daily)


@engines
async def test_it_opens_no_file_of_another_interval_or_year(
    sealed: Sealed, engine: str, tmp_path: Path
) -> None:
    damage_all_but(copied(sealed.folder, tmp_path), "5m", 2026)
    output = await output_of(program_of(engine), tmp_path)
    assert daily_of(output) == pytest.approx(sealed.vwap("5m", 2026), rel=1e-12)


@engines
async def test_it_opens_no_file_of_another_coin_where_the_query_names_one(
    sealed: Sealed, engine: str, tmp_path: Path
) -> None:
    program = changed(program_of(engine), YEAR[engine], COIN_TOO[engine])
    damage_all_but(copied(sealed.folder, tmp_path), "5m", 2026, "BTC")
    output = await output_of(program, tmp_path)
    assert daily_of(output) == pytest.approx(sealed.vwap("5m", 2026, "BTC"), rel=1e-12)


@pytest.mark.parametrize("engine", list(PART_OF_YEAR))
async def test_it_opens_no_file_of_other_days_of_the_year(
    sealed: Sealed, engine: str, tmp_path: Path
) -> None:
    program = changed(program_of(engine), YEAR[engine], PART_OF_YEAR[engine])
    root = copied(sealed.folder, tmp_path) / TABLE
    for number in (1, 2):
        for file in root.glob(f"**/year=2026/{bits_of([date(2026, 1, number)]):x}-*.parquet"):
            file.write_bytes(b"no Parquet")
    output = await output_of(program, tmp_path)
    expected = sealed.vwap("5m", 2026)
    assert daily_of(output) == pytest.approx(
        {key: price for key, price in expected.items() if key[2] >= "2026-01-03"}, rel=1e-12
    )


@engines
async def test_it_fails_where_the_query_needs_a_damaged_file(
    sealed: Sealed, engine: str, tmp_path: Path
) -> None:
    program = changed(program_of(engine), YEAR[engine], TWO_YEARS[engine])
    damage_all_but(copied(sealed.folder, tmp_path), "5m", 2026)
    code, output, _ = await run_engine(program, tmp_path)
    assert code == 1
    assert "vwap" not in output


async def test_pandas_has_a_series_as_it_was_sealed(sealed: Sealed, tmp_path: Path) -> None:
    damage_all_but(copied(sealed.folder, tmp_path), "5m", 2026, "BTC")
    output = await output_of(program_of("One series in pandas"), tmp_path)
    rows = list(csv.DictReader(io.StringIO(output)))
    wanted = [one for one in sealed.entries("5m", 2026, "BTC") if one.series.exchange != "binance"]
    wanted.sort(key=lambda entry: entry.timestamp)
    names = ("open", "high", "low", "close", "volume")
    assert [int(row["timestamp"]) for row in rows] == [entry.timestamp for entry in wanted]
    assert [[float(row[name]) for name in names] for row in rows] == [
        [getattr(entry.candle, name) for name in names] for entry in wanted
    ]
    assert [(row["market"], row["source"], int(row["revision"])) for row in rows] == [
        (entry.market, entry.source, entry.revision) for entry in wanted
    ]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux")
async def test_ray_listens_on_the_loopback_address_alone(sealed: Sealed) -> None:
    output = await output_of(program_of("Daft on Ray") + LISTENING, sealed.folder)
    addresses = {line.split()[1] for line in output.splitlines() if line.startswith("listening")}
    assert addresses
    assert addresses <= LOOPBACK
