"""What a sealed year of 5m candles of one coin costs to read and to send, against yardsticks in the
same run.

Each figure is a median of ``REPEATS`` interleaved repeats on a warm page cache; everything ends as
columns in memory.

- ours: ``CandleTable.read`` of the year, from a kept table that looks for newer versions each time;
  of a table of one coin, and of one with a hundred.
- feather: ``pandas.read_feather`` of the same candles, the format that freqtrade reads.
- stream: the rows a second that a WebSocket client reads of the year, of the service and of a bare
  server that sends the same messages already encoded; as both libraries come, with compression, and
  without. Whoever reads decodes every message.
- documents: ``StorageManagerImpl.get_raw_data_range`` of the same candles as JSON documents, the
  faster kind: without order books.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from itertools import groupby
from pathlib import Path

import pandas as pd
from bench_storage import SERIES, STEP, YEAR, YEAR_START, entries, fill, read, timed
from stream_history import make_ready, rates

from domain.entry import Entry
from domain.series import Series
from domain.time_range import TimeRange
from historical.candle_columns import CANDLE, SealedCandles
from historical.candle_table import CandleTable
from storage.implementations.local_file_storage import LocalFileStorage
from storage.manager import StorageManagerImpl
from storage.path_utility import day_of
from target_management.delta_engine import DeltaEngine

REPEATS = 30
DOCUMENT_REPEATS = 3
COINS = 100
WHOLE = TimeRange(YEAR_START, YEAR_START + YEAR * STEP)
FEATHER_BAR = 2.0
DOCUMENTS_BAR = 30.0
COINS_BAR = 1.5
STREAM_REPEATS = 9
STREAM_BAR = 0.5


def by_day(series: Series, year: list[Entry]) -> dict[date, list[Entry]]:
    """The same candles as those of another series, by day."""
    mine = (Entry(series, entry.market, entry.candle) for entry in year)
    return {day: list(group) for day, group in groupby(mine, lambda entry: day_of(entry.timestamp))}


def table_of(folder: Path, year: list[Entry], coins: int) -> CandleTable:
    """A table in which a year of so many coins is sealed; the first is the one that is read."""
    table = CandleTable(DeltaEngine(), str(folder), None)
    table.prepare()
    for number in range(coins):
        coin = SERIES.coin if number == 0 else f"COIN{number}"
        series = Series(SERIES.exchange, coin, SERIES.interval)
        table.seal(series, by_day(series, year))
    return table


def seconds(work: Callable[[], object]) -> float:
    """How long it takes; what it returns is freed afterwards."""
    gc.collect()
    began = time.perf_counter()
    answer = work()
    took = time.perf_counter() - began
    del answer
    return took


def check(found: SealedCandles, expected: pd.DataFrame) -> None:
    """A wrong answer is no figure."""
    if not all(
        (getattr(found.candles, name) == expected[name].to_numpy()).all() for name in CANDLE
    ):
        raise SystemExit("the table has other candles than were sealed")


def told(what: str, ratio: float, bar: float, *, held: bool) -> bool:
    """One line on a bar; whether it was held."""
    print(f"{what}: {ratio:.2f}; the bar is {bar:g}: {'held' if held else 'MISSED'}", flush=True)
    return held


async def streamed(root: Path, compression: str | None) -> bool:
    """Measure and print one kind of stream; whether its bar was held."""
    ours, bare = (
        statistics.median(found)
        for found in await rates(
            root, SERIES.coin, WHOLE, repeats=STREAM_REPEATS, compression=compression
        )
    )
    how = "compressed" if compression else "not compressed"
    print(f"stream, {how}: {ours:,.0f} rows/s; bare server: {bare:,.0f} rows/s", flush=True)
    ratio = ours / bare
    if compression is None:
        print(f"times the rate of a bare server, {how}: {ratio:.2f}; no bar", flush=True)
        return True
    return told(
        f"times the rate of a bare server, {how}", ratio, STREAM_BAR, held=ratio >= STREAM_BAR
    )


async def main() -> int:
    """Measure and print."""
    root = Path(tempfile.mkdtemp(prefix="bench-history-"))
    backend = LocalFileStorage(root / "documents")
    try:
        await backend.open()
        storage = StorageManagerImpl(backend)
        await fill(storage, YEAR, books=False)
        year = list(entries(YEAR, books=False))
        began = time.perf_counter()
        one = table_of(root / "documents" / "candles_delta", year, 1)
        print(f"a year sealed: {time.perf_counter() - began:.2f} s", flush=True)
        many = table_of(root / "many", year, COINS)
        frame = pd.DataFrame(
            {name: [getattr(entry.candle, name) for entry in year] for name in CANDLE}
        )
        frame.to_feather(root / "year.feather")
        del year
        check(many.read(SERIES, WHOLE), frame)
        figures: dict[str, list[float]] = {}
        for _ in range(REPEATS):
            for name, work in (
                ("feather", lambda: pd.read_feather(root / "year.feather")),
                ("one coin", lambda: one.read(SERIES, WHOLE)),
                ("many coins", lambda: many.read(SERIES, WHOLE)),
            ):
                figures.setdefault(name, []).append(seconds(work))
        for _ in range(DOCUMENT_REPEATS):
            figures.setdefault("documents", []).append(await timed(lambda: read(storage)))
        medians = {name: statistics.median(values) for name, values in figures.items()}
        for name, median in medians.items():
            print(f"{name}: {median * 1000:.2f} ms", flush=True)
        feather = medians["one coin"] / medians["feather"]
        documents = medians["documents"] / medians["one coin"]
        coins = medians["many coins"] / medians["one coin"]
        held = [
            told("times the time of feather", feather, FEATHER_BAR, held=feather <= FEATHER_BAR),
            told(
                "times as fast as documents",
                documents,
                DOCUMENTS_BAR,
                held=documents >= DOCUMENTS_BAR,
            ),
            told(
                f"times the time of one coin with {COINS}",
                coins,
                COINS_BAR,
                held=coins <= COINS_BAR,
            ),
        ]
        await make_ready(root / "documents", SERIES.exchange, SERIES.coin, WHOLE)
        held += [
            await streamed(root / "documents", compression) for compression in ("deflate", None)
        ]
        return 0 if all(held) else 1
    finally:
        await backend.close()
        shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
